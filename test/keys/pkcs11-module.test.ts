// A token of our own that speaks the vendor's dialects and lies: each lie ends as its own error, and
// this process goes on. The module's ML-KEM is held against two other implementations first: a token
// that fails for its own mistakes would prove nothing.
import { ml_kem768, ml_kem1024 } from '@noble/post-quantum/ml-kem.js';
import { beforeAll, describe, expect, test } from 'vitest';
import type { ErrorKind } from '../../src/errors.js';
import { Kem, type KemId, openTokenKey, type TokenKey, TokenModule } from '../../src/keys/index.js';
import { loadOqsKem } from '../../src/keys/liboqs.js';
import { PIN, type TestStyle, TestToken } from './pkcs11-support.js';
import { errorOf, secretOf } from './support.js';

const ORACLE = { [Kem.mlKem768]: ml_kem768, [Kem.mlKem1024]: ml_kem1024 };
const BOTH = [Kem.mlKem768, Kem.mlKem1024] as const;
const STYLES: readonly TestStyle[] = ['quac100', 'decrypt', 'pkcs11-3.2'];

const token = new TestToken();
beforeAll(() => token.init());

const ulong = (value: number) => {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setUint32(0, value, true);
  return bytes;
};

/** Puts an expanded private key onto the token: CKA_KEY_TYPE and CKA_VALUE. */
async function imported(module: TokenModule, kem: 1 | 2, dk: Uint8Array): Promise<TokenKey> {
  const handle = await module.create([
    { type: 0x100, value: ulong(0x80000001 + kem) },
    { type: 0x11, value: dk },
  ]);
  const encapsulationKey = new Uint8Array();
  return { handle, kem, label: '', id: new Uint8Array(), encapsulationKey, confined: true };
}

describe.each(BOTH)('the ML-KEM of the module: KEM %i', (kem) => {
  test('decapsulates as @noble/post-quantum does, rejections included', async () => {
    using module = await token.opened();
    const oracle = ORACLE[kem];
    for (let round = 0; round < 4; round += 1) {
      const { publicKey, secretKey } = oracle.keygen(new Uint8Array(64).fill(16 * kem + round));
      const key = await imported(module, kem, secretKey);
      const { cipherText } = oracle.encapsulate(publicKey);
      for (const at of [-1, 0, cipherText.length - 1]) {
        if (at >= 0) cipherText[at] = (cipherText[at] ?? 0) ^ 0x10;
        using shared = await module.decapsulate(key, cipherText);
        const theirs = oracle.decapsulate(cipherText, secretKey);
        expect(shared.use((bytes) => Uint8Array.from(bytes))).toEqual(theirs);
      }
      await module.destroy(key.handle);
    }
  });

  test.each(STYLES)('its keys work in dialect %s', async (style) => {
    const key = await token.generate(kem, `${style} ${kem}`, style);
    const { cipherText, sharedSecret } = ORACLE[kem].encapsulate(key.encapsulationKey);
    using module = await token.opened(style);
    const again = await module.key({ object: `${style} ${kem}` });
    using shared = await module.decapsulate(again, cipherText);
    expect(shared.use((bytes) => Uint8Array.from(bytes))).toEqual(sharedSecret);
    await token.unlock(key, token.place(style));
    await module.destroy(again.handle);
  });
});

describe('lies, crashes and refusals end as their own errors', () => {
  const liar = new TestToken();
  let key: TokenKey;
  beforeAll(async () => {
    await liar.init();
    key = await liar.generate(Kem.mlKem768, 'key');
    await loadOqsKem(Kem.mlKem768);
  });

  const cases: [mode: string, kind: ErrorKind, message: RegExp][] = [
    // The self-test at every open.
    ['wrong-secret', 'token_mistrusted', /self-test: its shared secret is another/],
    ['constant-secret', 'token_mistrusted', /self-test: its shared secret is another/],
    ['sticky-secret', 'token_mistrusted', /self-test: a changed ciphertext changes nothing/],
    ['short-secret', 'token_mistrusted', /a shared secret of 16 bytes, expected 32/],
    ['no-secret', 'token_mistrusted', /a shared secret of 0 bytes, expected 32/],
    ['long-secret', 'token_mistrusted', /a shared secret of 64 bytes, expected 32/],
    ['growing-attributes', 'token_mistrusted', /attribute changes its length/],
    // The public half.
    ['other-public-key', 'bad_key', /the key on the token is not the one of the key store/],
    ['unreduced-public-key', 'bad_key', /modulus check/],
    ['short-public-key', 'bad_key', /1183 bytes, expected 1184/],
    ['no-public-half', 'no_key', /the public half of key "key" is not on the token/],
    // The process.
    ['crash', 'token_crashed', /crashed its process \(SIGSEGV\)/],
    ['abort', 'token_crashed', /crashed its process \(SIGABRT\)/],
    ['exit', 'token_crashed', /crashed its process \(exit code 0\)/],
    ['crash-at-start', 'token_crashed', /SIGSEGV/],
    ['crash-at-login', 'token_crashed', /SIGSEGV/],
    ['writes-to-the-socket', 'token_crashed', /./],
    // The token's own word.
    ['removed', 'token_removed', /the token was removed \(CKR_DEVICE_REMOVED\)/],
    ['session-lost', 'token_session_lost', /CKR_SESSION_HANDLE_INVALID/],
    ['failed', 'token_refused', /the token refuses \(CKR_GENERAL_ERROR\)/],
    ['vendor-error', 'token_refused', /CKR 0x80000123/],
    ['derive-missing', 'unsupported', /CKR_FUNCTION_NOT_SUPPORTED/],
    ['pin-incorrect', 'wrong_pin', /wrong PIN \(CKR_PIN_INCORRECT\)/],
    ['pin-locked', 'pin_locked', /the PIN is locked/],
    ['pin-expired', 'pin_locked', /the PIN has expired/],
    ['no-token', 'token_unavailable', /no such token is there/],
    // Answers out of measure.
    ['many-slots', 'token_refused', /more than 64 slots/],
    ['endless-objects', 'token_refused', /more than 1024 objects/],
    ['overrun', 'token_mistrusted', /C_FindObjects overruns its list/],
    ['no-list', 'token_mistrusted', /gave no list/],
    ['empty-list', 'token_mistrusted', /function list is empty/],
  ];

  test.each(cases)('%s', async (mode, kind, message) => {
    liar.misbehave(mode);
    const error = await errorOf(() => liar.unlock(key)).finally(() => liar.misbehave(''));
    expect(error.message).toMatch(message);
    expect(error.kind).toBe(kind);
    expect(`${error.message}${error.hint}`).not.toContain(PIN);
    await liar.unlock(key); // and without the lie it opens: the error came from the lie
  });

  test('an overrun of C_Decrypt is caught', async () => {
    using module = await liar.opened('decrypt');
    const found = await module.key({ object: 'key' });
    liar.misbehave('overrun');
    const ciphertext = new Uint8Array(1088);
    const error = await errorOf(() => module.decapsulate(found, ciphertext)).finally(() =>
      liar.misbehave(''),
    );
    expect(error.message).toContain('longer than any of ML-KEM');
  });

  test.each(['hang', 'hang-at-start'])('%s ends with the time-out', async (mode) => {
    liar.misbehave(mode);
    const started = performance.now();
    const place = liar.place('quac100', { timeoutSeconds: 1 });
    const error = await errorOf(() => liar.unlock(key, place)).finally(() => liar.misbehave(''));
    expect(error).toMatchObject({ kind: 'token_timeout', exitCode: 43 });
    expect(performance.now() - started).toBeGreaterThan(900);
    await liar.unlock(key);
  });

  test.each(['slow', 'noisy', 'hang-at-end', 'no-login'])('%s is no error', async (mode) => {
    liar.misbehave(mode === 'no-login' ? '' : mode);
    await liar.unlock(key).finally(() => liar.misbehave(''));
  });

  test('a PIN pad asks for itself: no PIN of ours is sent', async () => {
    liar.misbehave('pinpad');
    const uri = { ...liar.uri, id: key.id };
    using _ = await openTokenKey(liar.place(), uri, key.encapsulationKey, undefined).finally(() =>
      liar.misbehave(''),
    );
  });

  test('a label cannot rewrite the terminal', async () => {
    liar.misbehave('rude-label');
    const error = await errorOf(() => liar.unlock(key)).finally(() => liar.misbehave(''));
    expect(error.hint).toContain('evil');
    expect(error.hint).not.toContain('\x1b');
  });

  test('a module that never had 3.2, and one that calls 3.0 by its name', async () => {
    liar.misbehave('only-2.40');
    const old = await errorOf(() => TokenModule.load(liar.place('pkcs11-3.2')));
    expect(old).toMatchObject({ kind: 'unsupported', exitCode: 12 });
    expect(old.message).toContain('does not offer interface PKCS 11 3.2');
    liar.misbehave('calls-3.0-3.2');
    const claims = await errorOf(() => TokenModule.load(liar.place('pkcs11-3.2'))).finally(() =>
      liar.misbehave(''),
    );
    expect(claims.kind).toBe('token_mistrusted');
  });

  test.each([
    ['extractable', /made a private key that it would let out/],
    ['other-parameter-set', /asked for a key of ML-KEM-768 and made one of ML-KEM-1024/],
    ['wrong-secret', /self-test/],
  ])('a new key is not kept: %s', async (mode, message) => {
    const own = new TestToken();
    await own.init();
    own.misbehave(mode);
    const error = await errorOf(() => own.generate(Kem.mlKem768, 'new'));
    expect(error.kind).toBe('token_mistrusted');
    expect(error.message).toMatch(message);
    own.misbehave('');
    using module = await own.opened();
    expect(await module.keys()).toEqual([]);
  });
});

describe('PINs', () => {
  const careful = new TestToken();
  let key: TokenKey;
  beforeAll(async () => {
    await careful.init();
    key = await careful.generate(Kem.mlKem768 satisfies KemId, 'key');
  });

  test('a wrong one costs one try, and the last is not taken unasked', async () => {
    for (let tries = 3; tries > 1; tries -= 1) {
      const error = await errorOf(() => careful.unlock(key, careful.place(), 'wrong'));
      expect(error.kind).toBe('wrong_pin');
    }
    // Even the right PIN is not sent now: whoever runs this in a loop has a wrong one as a rule.
    const kept = await errorOf(() => careful.unlock(key));
    expect(kept).toMatchObject({ kind: 'policy', exitCode: 6 });
    expect(kept.message).toContain('one more wrong PIN locks the token');
    const uri = { ...careful.uri, id: key.id };
    const last = { lastTry: true };
    const open = (pin: string) =>
      openTokenKey(careful.place(), uri, key.encapsulationKey, secretOf(pin), last);
    (await open(PIN))[Symbol.dispose](); // sets the count back
    await careful.unlock(key);
    for (let tries = 3; tries > 0; tries -= 1) {
      expect((await errorOf(() => open('wrong'))).kind).toBe('wrong_pin');
    }
    const locked = await errorOf(() => open(PIN));
    expect(locked).toMatchObject({ kind: 'pin_locked', exitCode: 41 });
  });
});

test('the security officer has a last try as well', async () => {
  const fresh = new TestToken();
  const init = async (soPin: string, lastTry?: boolean) => {
    using module = await TokenModule.load(fresh.place());
    const info = await module.find(fresh.uri);
    await module.initPin(info, secretOf(soPin), secretOf(PIN), { lastTry });
  };
  fresh.misbehave('so-locked');
  expect((await errorOf(() => init('so'))).kind).toBe('pin_locked');
  expect((await errorOf(() => init('so', true))).kind).toBe('pin_locked');
  fresh.misbehave('so-final-try');
  const kept = await errorOf(() => init('so'));
  expect(kept).toMatchObject({ kind: 'policy', hint: expect.stringContaining('init --last-try') });
  expect((await errorOf(() => init('wrong', true))).kind).toBe('wrong_pin');
  await init('so', true);
});

test('a file that is no module, one that is no library, and none at all', async () => {
  const place = token.place();
  const { sharedObjects } = process.report.getReport() as { sharedObjects: string[] };
  const library = sharedObjects.find((path) => /\/libm\.so/.test(path)) ?? '';
  const libc = await errorOf(() => TokenModule.load({ ...place, module: library }));
  expect(libc).toMatchObject({ kind: 'bad_module', exitCode: 48 });
  expect(libc.message).toContain('no C_GetFunctionList');
  const text = await errorOf(() => TokenModule.load({ ...place, module: '/etc/hostname' }));
  expect(text).toMatchObject({ kind: 'bad_module' });
  expect(text.message).toContain('cannot load /etc/hostname');
  const none = await errorOf(() => TokenModule.load({ ...place, module: '/nowhere/x.so' }));
  expect(none).toMatchObject({ kind: 'not_found', path: '/nowhere/x.so' });
  const relative = await errorOf(() => TokenModule.load({ ...place, module: 'x.so' }));
  expect(relative.kind).toBe('invalid_argument');
});
