import { format, inspect } from 'node:util';
import { expect, test } from 'vitest';
import { createKeyArea, openKeyArea, Secret } from '../../src/keys/index.js';
import { errorOf, person } from './support.js';

test('a secret never prints', () => {
  const secret = new Secret(new TextEncoder().encode('correct horse battery'));
  const shown = [
    String(secret),
    `${secret}`,
    JSON.stringify({ secret }),
    inspect({ deep: [secret] }, { showHidden: true, depth: 9 }),
    format('%s %o %O %j', secret, secret, secret, secret),
    inspect(secret, { customInspect: false, showHidden: true }),
    Object.keys(secret).join(),
  ].join('\n');
  expect(shown).not.toContain('horse');
  expect(shown).not.toContain('99, 111'); // the bytes of "co"
  expect(JSON.stringify({ secret })).toBe('{"secret":"[secret]"}');
});

test('wiping zeroes the very buffer and closes the secret', () => {
  const bytes = Uint8Array.of(1, 2, 3);
  {
    using secret = new Secret(bytes);
    expect(secret.length).toBe(3);
  }
  expect(bytes).toEqual(new Uint8Array(3));
  const secret = Secret.random(32);
  secret.wipe();
  secret.wipe();
  expect(secret.wiped).toBe(true);
  expect(secret.length).toBe(0);
  expect(() => secret.use((held) => held)).toThrowError(/wiped/);
});

test('a copy is a copy, and equality is by content', () => {
  const bytes = Uint8Array.of(1, 2, 3);
  const copy = Secret.copyOf(bytes);
  const other = Secret.copyOf(bytes);
  expect(copy.equals(other)).toBe(true);
  bytes.fill(9);
  expect(copy.equals(other)).toBe(true);
  expect(copy.equals(Secret.copyOf(bytes))).toBe(false);
  expect(copy.equals(Secret.copyOf(bytes.subarray(1)))).toBe(false);
});

test('what the key layer hands out and throws shows no key', async () => {
  const [alice, bob] = [await person('alice'), await person('bob')];
  const volumeUuid = new Uint8Array(16).fill(3);
  const area = await createKeyArea({ volumeUuid, recipients: [alice.recipient] });
  const opened = await openKeyArea(area.blob, alice.identity);
  const error = await errorOf(() => openKeyArea(area.blob, bob.identity));
  const shown = [opened, alice.identity, error].map((value) =>
    [inspect(value, { depth: 9, showHidden: true, maxArrayLength: null }), JSON.stringify(value)]
      .join('\n')
      .replaceAll(/\s+/g, ''),
  );
  const keys = [opened.integrityKey, ...opened.dataKeys.values()];
  if (alice.identity.privateKey.type === 'software') {
    keys.push(alice.identity.privateKey.decapsulationKey);
  }
  for (const key of keys) {
    key.use((bytes) => {
      const decimal = [...bytes.subarray(0, 8)].join(',');
      const hex = Buffer.from(bytes.subarray(0, 8)).toString('hex');
      for (const text of shown) {
        expect(text).not.toContain(decimal);
        expect(text).not.toContain(hex);
      }
    });
  }
});
