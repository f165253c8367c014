// Room cli/: `pqblk token list|test|init|profile`: what is on a token, and whether it can be trusted.
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { PqblkError } from '../errors.js';
import {
  fingerprintOf,
  kemParameters,
  loadProfile,
  openTokenKey,
  PROFILES,
  parseTokenUri,
  proveKey,
  readPassphrase,
  Secret,
  type TokenEntry,
  type TokenInfo,
  TokenModule,
  toHex,
  uriOf,
} from '../keys/index.js';
import {
  addPassphraseOptions,
  addPinOptions,
  examples,
  jsonOption,
  openStore,
  passphraseFor,
  readPin,
  type StoreFlags,
  storeOption,
} from './options.js';
import type { Terminal } from './terminal.js';
import { addTokenOptions, logIn, namedModule, type TokenFlags } from './token-key.js';

interface Flags extends TokenFlags {
  json?: boolean;
}

const MODULE_EXAMPLE = '--module /usr/lib/vendor.so';

export function addToken(program: Command, terminal: Terminal): void {
  const token = program
    .command('token')
    .description('Look at PKCS#11 tokens and test them.')
    .addHelpText(
      'after',
      `
A token's module runs in a process of its own. A profile says how a kind of token speaks ML-KEM:
${Object.keys(PROFILES).join(', ')}, or a file of yours. Keys are made on a token with \`pqblk key gen
--token\`. A PIN is read from a file, a descriptor or the terminal, and tried once.`,
    );
  addList(token, terminal);
  addTest(token, terminal);
  addInit(token, terminal);
  addProfile(token, terminal);
}

// ---- list ------------------------------------------------------------------------------------------

interface Listed {
  readonly uri: string;
  readonly kem: string;
  readonly label: string;
  readonly id: string;
  readonly fingerprint?: string;
  readonly confined: boolean;
  readonly problem?: PqblkError;
}

function addList(token: Command, terminal: Terminal): void {
  const command = token
    .command('list')
    .description('List the tokens of a module; with --token also the keys on that one.')
    .addOption(jsonOption());
  addPinOptions(addTokenOptions(command))
    .addHelpText(
      'after',
      examples(
        `pqblk token list ${MODULE_EXAMPLE}`,
        `pqblk token list ${MODULE_EXAMPLE} --token pkcs11:token=HSM`,
      ),
    )
    .action(async (flags: Flags) => {
      const { place, uri } = await namedModule(flags);
      using module = await TokenModule.load(place);
      const tokens = await module.tokens();
      const shown = await Promise.all(
        tokens.map(async (one) => ({
          ...one,
          kems: (await module.kems(one)).map((kem) => kemParameters(kem).name),
        })),
      );
      const chosen = flags.token === undefined ? undefined : await logIn(module, uri, flags);
      const keys = chosen ? (await module.keys(uri)).map((key) => listed(chosen, key)) : undefined;
      if (flags.json) {
        terminal.json({ module: { path: place.module, ...module.info }, tokens: shown, keys });
        return;
      }
      terminal.table(
        ['SLOT', 'TOKEN', 'SERIAL', 'MODEL', 'LOGIN', 'KEMS'],
        shown.map((one) => [
          String(one.slotId),
          one.label || '-',
          one.serial || '-',
          one.model || '-',
          one.ready ? one.login : 'no PIN yet',
          one.kems.join(' ') || 'none',
        ]),
      );
      if (keys) showKeys(terminal, keys);
      else terminal.remark('name a token with --token to see its keys');
    });
}

function listed(token: TokenInfo, key: TokenEntry): Listed {
  const { publicHalf } = key;
  return {
    uri: uriOf(token, key),
    kem: kemParameters(key.kem).name,
    label: key.label,
    id: toHex(key.id),
    confined: key.confined,
    ...(publicHalf instanceof PqblkError
      ? { problem: publicHalf }
      : { fingerprint: toHex(fingerprintOf(publicHalf)) }),
  };
}

function showKeys(terminal: Terminal, keys: readonly Listed[]): void {
  if (keys.length === 0) {
    terminal.remark('no KEM keys on this token; `pqblk key gen NAME --token URI` makes one');
    return;
  }
  terminal.line('');
  terminal.table(
    ['KEY', 'KEM', 'FINGERPRINT', 'LEAVES', 'URI'],
    keys.map((key) => [
      key.label || '-',
      key.kem,
      key.fingerprint?.slice(0, 16) ?? '-',
      key.confined ? 'never' : 'COULD LEAVE',
      key.uri,
    ]),
  );
  for (const { problem } of keys) if (problem) terminal.remark(problem.message);
}

// ---- test ------------------------------------------------------------------------------------------

interface TestFlags extends Flags, StoreFlags {
  key?: string;
  lastTry?: boolean;
}

interface Tested {
  readonly uri: string;
  readonly kem: string;
  readonly fingerprint: string;
  readonly ms: number;
}

function addTest(token: Command, terminal: Terminal): void {
  const command = token
    .command('test')
    .description('Have the keys on a token prove that they decapsulate what software encapsulates.')
    .option('--key <name>', 'the key of the store that is on the token')
    .option('--last-try', 'try the PIN although a wrong one would lock the token')
    .addOption(storeOption())
    .addOption(jsonOption());
  addPassphraseOptions(addTokenOptions(command))
    .addHelpText(
      'after',
      examples(
        'pqblk token test --key vault',
        `pqblk token test ${MODULE_EXAMPLE} --token pkcs11:token=HSM`,
      ),
    )
    .action(async (flags: TestFlags) => {
      const tested =
        flags.key === undefined ? await testUri(flags) : [await testKey(flags.key, flags)];
      if (flags.json) {
        terminal.json({ tested });
        return;
      }
      for (const { uri, kem, fingerprint, ms } of tested) {
        terminal.line(`${kem} ${fingerprint.slice(0, 16)} proved in ${ms} ms: ${uri}`);
      }
    });
}

async function testUri(flags: TestFlags): Promise<Tested[]> {
  const { place, uri } = await namedModule(flags);
  using module = await TokenModule.load(place);
  const token = await logIn(module, uri, flags, { lastTry: flags.lastTry });
  const tested: Tested[] = [];
  for (const entry of await module.keys(uri)) {
    if (entry.publicHalf instanceof PqblkError) throw entry.publicHalf;
    const key = { ...entry, encapsulationKey: entry.publicHalf };
    const started = performance.now();
    await proveKey(module, key);
    tested.push({
      uri: uriOf(token, key),
      kem: kemParameters(key.kem).name,
      fingerprint: toHex(fingerprintOf(key.encapsulationKey)),
      ms: Math.round(performance.now() - started),
    });
  }
  if (tested.length > 0) return tested;
  throw new PqblkError('no_key', 'no such key on the token; nothing was tested', {
    path: place.module,
    hint: '`pqblk token list` shows the keys that are there',
  });
}

/** As an open would: `store.unlock` proves the key. */
async function testKey(reference: string, flags: TestFlags): Promise<Tested> {
  const store = openStore(flags);
  const info = await store.show(reference);
  const { token } = info;
  if (!token) throw new PqblkError('invalid_argument', `key "${info.name}" is not on a token`);
  using pin = await passphraseFor(info, flags);
  const { encapsulationKey } = await store.recipient(reference);
  const place = { ...token, profile: await loadProfile(token.profile) };
  const started = performance.now();
  using _ = await openTokenKey(place, parseTokenUri(token.uri), encapsulationKey, pin, {
    lastTry: flags.lastTry,
  });
  const ms = Math.round(performance.now() - started);
  return { uri: token.uri, kem: info.kem, fingerprint: info.fingerprint, ms };
}

// ---- init ------------------------------------------------------------------------------------------

interface InitFlags extends Flags {
  soPinFile?: string;
  soPinFd?: number;
  lastTry?: boolean;
}

function addInit(token: Command, terminal: Terminal): void {
  const command = token
    .command('init')
    .description('Give a token its first user PIN, as its security officer. Erases nothing.')
    .option('--last-try', "try the security officer's PIN though a wrong one locks it")
    .addOption(jsonOption());
  addPinOptions(addTokenOptions(command), '', 'new user PIN');
  addPinOptions(command, 'so-', 'PIN of the security officer')
    .addHelpText(
      'after',
      examples(`pqblk token init ${MODULE_EXAMPLE} --token pkcs11:token=HSM --pin-file pin`),
    )
    .action(async (flags: InitFlags) => {
      const { place, uri } = await namedModule(flags);
      using module = await TokenModule.load(place);
      const info = await module.find(uri);
      using soPin = await soPinFor(flags, place.profile.freshSoPin);
      using pin = await readPin(flags, uri.pinFile, `New PIN of token "${info.label}"`, true);
      await module.initPin(info, soPin, pin, { lastTry: flags.lastTry });
      if (flags.json) terminal.json({ initialized: info.label });
      else terminal.line(`the token "${info.label}" has a user PIN now`);
    });
}

async function soPinFor(flags: InitFlags, fresh: string | undefined): Promise<Secret> {
  const { soPinFile, soPinFd } = flags;
  if (soPinFile === undefined && soPinFd === undefined && fresh !== undefined) {
    return new Secret(new TextEncoder().encode(fresh));
  }
  if (soPinFd !== undefined) return await readPassphrase({ from: 'fd', fd: soPinFd }, 'PIN');
  return await readPin(
    { ...(soPinFile !== undefined && { pinFile: soPinFile }) },
    undefined,
    'PIN of the security officer',
  );
}

// ---- profile ---------------------------------------------------------------------------------------

function addProfile(token: Command, terminal: Terminal): void {
  token
    .command('profile [name|file]')
    .description('Print a shipped profile, or check one of yours; without a name, list them.')
    .addHelpText('after', examples('pqblk token profile nss', 'pqblk token profile ./my-hsm.json'))
    .action(async (name: string | undefined) => {
      if (name === undefined) {
        terminal.table(
          ['PROFILE', 'FOR'],
          Object.entries(PROFILES).map(([known, profile]) => [
            known,
            (profile as { description: string }).description,
          ]),
        );
        return;
      }
      const shipped = Object.hasOwn(PROFILES, name) ? PROFILES[name] : undefined;
      if (shipped) {
        terminal.json(shipped);
        return;
      }
      const profile = await loadProfile(name.includes('/') ? resolve(name) : name);
      terminal.line(`the profile "${profile.name}" is in order`);
    });
}
