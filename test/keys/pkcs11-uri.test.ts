// RFC 7512 URIs: what is read, what is written, and what is refused by name.
import { describe, expect, test } from 'vitest';
import { formatTokenUri, parseTokenUri } from '../../src/keys/index.js';
import { slotReference } from '../../src/keys/pkcs11/uri.js';
import { errorOf } from './support.js';

describe('reading', () => {
  test('every attribute', () => {
    const text =
      'pkcs11:token=Card%20%c3%a4;manufacturer=M;model=m1;serial=007;slot-id=3;' +
      'object=a%2fb;type=private;id=%01%feA?module-path=/usr/lib/x.so&pin-source=file:/etc/p' +
      '&x-pqblk-profile=nss&x-pqblk-directory=/var/t';
    expect(parseTokenUri(text)).toEqual({
      token: 'Card ä',
      manufacturer: 'M',
      model: 'm1',
      serial: '007',
      slotId: 3,
      object: 'a/b',
      id: Uint8Array.of(1, 0xfe, 0x41),
      modulePath: '/usr/lib/x.so',
      pinFile: '/etc/p',
      profile: 'nss',
      directory: '/var/t',
    });
  });

  test.each([
    ['file:/etc/pin', '/etc/pin'],
    ['file:///etc/pin', '/etc/pin'],
    ['/etc/pin', '/etc/pin'],
    ['file:/etc/p%20n', '/etc/p n'],
  ])('pin-source=%s', (source, path) => {
    expect(parseTokenUri(`pkcs11:?pin-source=${source}`).pinFile).toBe(path);
  });

  test('a name may have & and = in it, and speak of pins', () => {
    expect(parseTokenUri('pkcs11:object=a&b=c,spin=2').object).toBe('a&b=c,spin=2');
  });

  test('an empty path means any token', () => {
    expect(parseTokenUri('pkcs11:')).toEqual({});
    expect(parseTokenUri('PKCS11:token=x')).toEqual({ token: 'x' });
  });
});

test('what was written is read back, whatever is in it', () => {
  const uri = {
    token: 'ü ;?&=%#"',
    serial: '[x]',
    object: "a'b\\",
    id: Uint8Array.from({ length: 256 }, (_, i) => i),
  };
  expect(parseTokenUri(formatTokenUri(uri))).toEqual(uri);
  expect(formatTokenUri({ token: 'a b', id: Uint8Array.of(0, 255) })).toBe(
    'pkcs11:token=a%20b;id=%00%ff',
  );
});

test.each([
  ['http://x', /begins with pkcs11/],
  ['pkcs11', /begins with pkcs11/],
  ['pkcs11:token', /attribute=value, found "token"/],
  ['pkcs11:=x', /attribute=value/],
  ['pkcs11:token=a;', /attribute=value/],
  ['pkcs11:token=a;token=b', /attribute token once/],
  ['pkcs11:token=%4', /percent-encoding in attribute token/],
  ['pkcs11:token=%zz', /percent-encoding/],
  ['pkcs11:token=a b', /percent-encoding/],
  ['pkcs11:token=%ff', /UTF-8 in attribute token/],
  ['pkcs11:token=%0a', /printable text/],
  ['pkcs11:token=', /printable text/],
  ['pkcs11:id=', /bytes in attribute id/],
  ['pkcs11:slot-id=x', /a number in attribute slot-id/],
  ['pkcs11:type=public', /type=private, found "type=public"/],
  ['pkcs11:flavour=x', /one of the attributes token,.* found "flavour"/],
  ['pkcs11:?module-name=x', /one of the query attributes module-path,.*"module-name"/],
  ['pkcs11:?module-path=x.so', /an absolute path in attribute module-path/],
  ['pkcs11:?pin-source=%7Ccat', /an absolute path in attribute pin-source/],
  [`pkcs11:token=${'a'.repeat(5000)}`, /at most 4096 characters/],
])('refused: %.40s', async (text, message) => {
  const error = await errorOf(() => parseTokenUri(text));
  expect(error.kind).toBe('bad_uri');
  expect(error.message).toMatch(message);
});

test.each([
  'pkcs11:token=a&pin-value=s3cret',
  'pkcs11:token=a;object=b&pin-value=s3cret',
  'pkcs11:token=a;object=b,PIN=s3cret',
  'pkcs11:token=a;object=b%26pin%2dvalue%3ds3cret',
  'pkcs11:token=a&pin-value=s3cret%zz',
  'pkcs11:token=a&pin-source=s3cret;object=b',
  'pkcs11:token=a?pin-value=s3cret',
  'pkcs11:token=a?PIN-VALUE=s3cret',
  'pkcs11:token=a?pin-value =s3cret',
  'pkcs11:token=a?pin%2Dvalue=s3cret',
  'pkcs11:token=a?pin-source=s3cret',
  'pkcs11:token=a?pin-source=s3cret%ff',
  'pkcs11:token=a?pin-source=s3cret%zz',
  'pkcs11:token=a?pin-source=/x&s3cret',
  'pkcs11:token=a?=s3cret',
  'pkcs11:token=a;PIN-VALUE=s3cret',
  'pkcs12:?pin-value=s3cret',
  `pkcs11:?pin-value=s3cret${'x'.repeat(5000)}`,
])('a PIN in a URI is refused and not quoted: %.40s', async (uri) => {
  const error = await errorOf(() => parseTokenUri(uri));
  expect(error.kind).toBe('bad_uri');
  expect(`${error.message} ${error.hint}`).not.toContain('s3cret');
});

test('a PIN in a URI is told where it belongs', async () => {
  const error = await errorOf(() => parseTokenUri('pkcs11:token=a?pin-value=s3cret'));
  expect(error.message).toContain('pin-source=file:PATH');
});

test('a slot of a disk gets the longest reference that fits', () => {
  const uri = { token: 'T', serial: '1', object: 'o'.repeat(300), id: Uint8Array.of(1) };
  expect(slotReference(uri, 400)).toBe(formatTokenUri(uri));
  expect(slotReference(uri, 320)).toBe('pkcs11:token=T;serial=1;id=%01');
  expect(slotReference(uri, 26)).toBe('pkcs11:serial=1;id=%01');
  expect(slotReference(uri, 5)).toBe('');
});
