// The keys that a soak's disks are sealed to: alice and bob in software, vault on a token, the PKCS#11
// module of the tests (test/pkcs11-module); and carol's, which gets a slot now and then.
import { symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { pqblk } from './processes.mjs';

const MODULE = fileURLToPath(
  new URL('../../build/release/tests/libpqblk_test_token.so', import.meta.url),
);
const TOKEN = 'pkcs11:token=Test%20token';

export const KEYS = ['alice', 'bob', 'vault'];
export const GUEST_KEY = 'carol';

/** Makes them in `directory`; returns what the command line has to be told of them. */
export async function makeKeys(directory) {
  const at = (name) => join(directory, name);
  const env = { PQBLK_KEYS: at('store') };
  const must = async (...words) => {
    const { code, stderr } = await pqblk(words, env);
    if (code !== 0) throw new Error(`pqblk ${words.join(' ')}: ${stderr}`);
  };
  symlinkSync(MODULE, at('module.so')); // it keeps its token beside itself
  writeFileSync(at('pin'), 'pin-of-the-soak\n', { mode: 0o600 });
  writeFileSync(at('so-pin'), 'so\n', { mode: 0o600 });
  const module = ['--module', at('module.so'), '--profile', 'quac100'];
  const pins = ['--pin-file', at('pin'), '--so-pin-file', at('so-pin')];
  await must('token', 'init', ...module, '--token', TOKEN, ...pins);
  await must('key', 'gen', 'vault', ...module, '--token', `${TOKEN}?pin-source=${at('pin')}`);
  for (const name of ['alice', 'bob', GUEST_KEY]) await must('key', 'gen', name, '--no-passphrase');
  return env;
}
