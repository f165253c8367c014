// A real token: NSS's softokn, initialised here, against liboqs and @noble/post-quantum.
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { ml_kem768, ml_kem1024 } from '@noble/post-quantum/ml-kem.js';
import { beforeAll, describe, expect, test } from 'vitest';
import {
  formatTokenUri,
  Kem,
  KeyStore,
  kemParameters,
  openTokenKey,
  proveKey,
  TokenModule,
  TokenProvider,
} from '../../src/keys/index.js';
import { freshNss, haveNss, NSS_TOKEN, PIN } from './pkcs11-support.js';
import { errorOf, secretOf, temporaryDirectory } from './support.js';

const ORACLE = { [Kem.mlKem768]: ml_kem768, [Kem.mlKem1024]: ml_kem1024 };

describe.runIf(haveNss())('NSS softokn', () => {
  let token: ReturnType<typeof freshNss>;
  beforeAll(() => {
    token = freshNss(); // not where the tests are collected, which happens without a token, too
  });

  async function opened(readWrite = true) {
    const { place, uri } = await token;
    const module = await TokenModule.load(place);
    const info = await module.find(uri);
    using pin = secretOf(PIN);
    await module.logIn(info, pin, { readWrite });
    return { module, info };
  }

  test('the module speaks 3.2 and offers both KEMs', async () => {
    const { module, info } = await opened();
    using _ = module;
    expect(module.info.interface).toBe('3.2');
    expect(info).toMatchObject({ label: NSS_TOKEN, login: 'pin', ready: true });
    expect(await module.kems(info)).toEqual([Kem.mlKem768, Kem.mlKem1024]);
  });

  test.each([Kem.mlKem768, Kem.mlKem1024] as const)('KEM %i: keys work and stay', async (kem) => {
    const { module, info } = await opened();
    using _ = module;
    const key = await module.generate(kem, `kem ${kem}`, (made) => proveKey(module, made));
    expect(key).toMatchObject({ kem, label: `kem ${kem}`, confined: true });
    expect(key.encapsulationKey).toHaveLength(kemParameters(kem).encapsulationKeyBytes);
    // A third implementation encapsulates, the token decapsulates.
    const { cipherText, sharedSecret } = ORACLE[kem].encapsulate(key.encapsulationKey);
    using shared = await module.decapsulate(key, cipherText);
    expect(shared.use((bytes) => Uint8Array.from(bytes))).toEqual(sharedSecret);
    const provider = new TokenProvider(module, info);
    provider.adopt(key);
    await provider.selfTest(kem);
    expect(await provider.describe()).toMatchObject({ hardware: true, version: '3.125' });
    const error = await errorOf(() =>
      provider.decapsulate({ type: 'token', kem, uri: 'pkcs11:' }, cipherText),
    );
    expect(error.kind).toBe('bad_key');
  });

  test('a store entry opens, in a process of its own each time', async () => {
    const { place, uri } = await token;
    const store = new KeyStore(join(await temporaryDirectory(), 'keys'));
    const { module } = await opened();
    const key = await module.generate(Kem.mlKem768, 'stored', async () => {});
    module.end();
    const at = formatTokenUri({ ...uri, id: key.id });
    const info = await store.addToken('vault', key.kem, key.encapsulationKey, {
      protection: 'token',
      uri: at,
      module: place.module,
      profile: 'nss',
      directory: place.directory,
      login: 'pin',
    });
    expect(info).toMatchObject({ protection: 'token', token: { uri: at } });
    using identity = await store.unlock('vault', secretOf(PIN));
    const { ciphertext, sharedSecret } = await identity.provider.encapsulate(
      Kem.mlKem768,
      key.encapsulationKey,
    );
    using shared = await identity.provider.decapsulate(identity.privateKey, ciphertext);
    expect(shared.equals(sharedSecret)).toBe(true);
    expect((await errorOf(() => store.unlock('vault'))).kind).toBe('passphrase_needed');
    const recipient = await store.recipient('vault');
    expect(recipient).toMatchObject({ home: 2, tokenReference: at });
    const exported = await store.exportPublic('vault');
    expect(exported).not.toContain('pkcs11');
    const refused = await errorOf(() => store.exportPrivate('vault', undefined, secretOf('x')));
    expect(refused.kind).toBe('unsupported');
  });

  test('a wrong PIN is an error of its own, and tried once', async () => {
    const { place, uri } = await token;
    const key = new Uint8Array(1184);
    const error = await errorOf(() => openTokenKey(place, uri, key, secretOf('wrong')));
    expect(error).toMatchObject({ kind: 'wrong_pin', exitCode: 40, operation: 'C_Login' });
  });

  test('no such token, no such key, several keys', async () => {
    const { module } = await opened();
    using _ = module;
    const missing = await errorOf(() => module.find({ token: 'Other' }));
    expect(missing).toMatchObject({ kind: 'token_unavailable', exitCode: 4 });
    expect(missing.hint).toContain('NSS%20Certificate%20DB');
    expect((await errorOf(() => module.find({}))).kind).toBe('ambiguous');
    const noKey = await errorOf(() => module.key({ object: 'nobody' }));
    expect(noKey.kind).toBe('no_key');
    for (let i = 0; i < 2; i += 1) await module.generate(Kem.mlKem768, 'twice', async () => {});
    const several = await errorOf(() => module.key({ object: 'twice' }));
    expect(several.kind).toBe('ambiguous');
    expect(several.hint).toMatch(/id=%.* or id=%/);
  });

  test('a key that is refused at its proof does not stay on the token', async () => {
    const { module } = await opened();
    using _ = module;
    await expect(
      module.generate(Kem.mlKem768, 'refused', () => Promise.reject(new Error('no'))),
    ).rejects.toThrow('no');
    expect((await errorOf(() => module.key({ object: 'refused' }))).kind).toBe('no_key');
  });

  test('a read-only session makes no keys', async () => {
    const { module } = await opened(false);
    using _ = module;
    const error = await errorOf(() => module.generate(Kem.mlKem768, 'x', async () => {}));
    expect(error.kind).toBe('permission');
  });

  test('a token without a user PIN says so, and gets one once only', async () => {
    const { place, uri } = await token;
    const directory = await temporaryDirectory();
    await mkdir(join(directory, 'new'));
    const fresh = { ...place, directory: join(directory, 'new') };
    using module = await TokenModule.load(fresh);
    const info = await module.find(uri);
    expect(info.ready).toBe(false);
    await module.initPin(info, secretOf(''), secretOf('1234'));
    const again = await TokenModule.load(fresh);
    using _ = again;
    const error = await errorOf(async () =>
      again.initPin(await again.find(uri), secretOf(''), secretOf('5678')),
    );
    expect(error.kind).toBe('exists');
  });

  test('the directory of a token cannot add parameters to its configuration', async () => {
    const { place } = await token;
    const error = await errorOf(() => TokenModule.load({ ...place, directory: "/tmp/x' flags='" }));
    expect(error.kind).toBe('invalid_argument');
    const { directory: _, ...without } = place;
    expect((await errorOf(() => TokenModule.load(without))).kind).toBe('usage');
    const gone = await errorOf(() => TokenModule.load({ ...place, directory: '/nowhere/nss' }));
    expect(gone).toMatchObject({ kind: 'not_found', path: '/nowhere/nss' });
  });
});
