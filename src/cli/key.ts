// Room cli/: `pqblk key gen|list|show|export|import|delete`: the key store from the command line.
import { writeFile } from 'node:fs/promises';
import { text as readAll } from 'node:stream/consumers';
import { type Command, Option } from 'commander';
import { fromSystem, PqblkError } from '../errors.js';
import {
  Kem,
  type KeyInfo,
  type KeyStore,
  kemByName,
  kemParameters,
  type Protection,
  readInputText,
  readPassphrase,
  type Secret,
  waitingFor,
} from '../keys/index.js';
import {
  addPassphraseOptions,
  examples,
  jsonOption,
  KEY_TEXT,
  openStore,
  type PassphraseFlags,
  passphraseFor,
  passphraseSource,
  refuse,
  type StoreFlags,
  storeOption,
} from './options.js';
import type { Terminal } from './terminal.js';
import {
  addTokenOptions,
  generateOnToken,
  importFromToken,
  requireTokenFlags,
  type TokenFlags,
} from './token-key.js';

interface Flags extends StoreFlags, PassphraseFlags {
  json?: boolean;
}

const SHORT_FINGERPRINT = 16;
/** The first is the default. */
const KEMS = [Kem.mlKem768, Kem.mlKem1024, Kem.xWing].map((id) =>
  kemParameters(id).name.toLowerCase(),
);

export function addKey(program: Command, terminal: Terminal): void {
  const key = program
    .command('key')
    .description('Make and keep the key pairs that disks are sealed to.')
    .addHelpText(
      'after',
      `
Private keys are kept under a passphrase (scrypt, AES-256-GCM) in a directory that only you can
read. A passphrase is asked for on the terminal unless an option names a file, a descriptor or an
environment variable. A key is named by its name or by the first 8 digits of its fingerprint.`,
    );
  addGen(key, terminal);
  addList(key, terminal);
  addShow(key, terminal);
  addExport(key, terminal);
  addImport(key, terminal);
  addDelete(key, terminal);
}

// ---- gen -------------------------------------------------------------------------------------------

interface GenFlags extends Flags, TokenFlags {
  kem: string;
  name?: string;
  passphrase: boolean;
}

function addGen(key: Command, terminal: Terminal): void {
  const command = key
    .command('gen [name]')
    .description('Make a key pair.')
    .option('--name <name>', 'the same as the argument')
    .addOption(
      new Option('--kem <kem>', 'ml-kem-1024 where CNSA 2.0 asks for it, x-wing to add X25519')
        .choices(KEMS)
        .default(KEMS[0]),
    )
    .option(
      '--no-passphrase',
      'keep the private key unprotected (for machines without an operator)',
    )
    .addOption(storeOption())
    .addOption(jsonOption());
  addTokenOptions(addPassphraseOptions(command))
    .addHelpText(
      'after',
      examples(
        'pqblk key gen alice',
        'pqblk key gen backup --kem ml-kem-1024',
        'pqblk key gen vault --token pkcs11:token=HSM --module /usr/lib/vendor.so',
      ),
    )
    .action(async (argument: string | undefined, flags: GenFlags) => {
      const name = argument ?? flags.name ?? 'default';
      const kem = kemByName(flags.kem).id;
      requireTokenFlags(flags);
      if (flags.token !== undefined) {
        show(terminal, await generateOnToken(openStore(flags), name, kem, flags), flags);
        return;
      }
      using protection = await newProtection(flags, `New passphrase for key "${name}"`);
      show(terminal, await openStore(flags).generate(name, protection.value, kem), flags);
    });
}

/** How a new private key shall be kept. Wipes the passphrase when it goes out of scope. */
async function newProtection(
  flags: PassphraseFlags & { passphrase: boolean },
  prompt: string,
): Promise<{ value: Protection } & Disposable> {
  if (!flags.passphrase) return { value: { noPassphrase: true }, [Symbol.dispose]: () => {} };
  const passphrase = await readPassphrase(passphraseSource(flags, prompt, true));
  return { value: { passphrase }, [Symbol.dispose]: () => passphrase.wipe() };
}

// ---- list, show ------------------------------------------------------------------------------------

function addList(key: Command, terminal: Terminal): void {
  key
    .command('list')
    .description('List the keys of the store.')
    .addOption(storeOption())
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk key list', 'pqblk key list --json'))
    .action(async (flags: Flags) => {
      const { keys, damaged } = await openStore(flags).list();
      if (flags.json) {
        terminal.json({ keys, damaged });
      } else if (keys.length === 0) {
        terminal.remark('no keys yet; `pqblk key gen NAME` makes one');
      } else {
        terminal.table(
          ['NAME', 'KEM', 'FINGERPRINT', 'PROTECTION', 'CREATED'],
          keys.map((info) => [
            info.name,
            info.kem,
            info.fingerprint.slice(0, SHORT_FINGERPRINT),
            info.protection,
            info.created.slice(0, 10),
          ]),
        );
      }
      if (!flags.json) for (const error of damaged) terminal.remark(`damaged: ${error.toLine()}`);
    });
}

function addShow(key: Command, terminal: Terminal): void {
  key
    .command('show <key>')
    .description('Show one key.')
    .addOption(storeOption())
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk key show alice'))
    .action(async (reference: string, flags: Flags) => {
      show(terminal, await openStore(flags).show(reference), flags);
    });
}

function show(terminal: Terminal, info: KeyInfo, flags: Flags): void {
  if (flags.json) {
    terminal.json(info);
    return;
  }
  terminal.fields([
    ['name', info.name],
    ['KEM', info.kem],
    ['fingerprint', info.fingerprint],
    ['private key', PROTECTION_TEXT[info.protection]],
    ['created', info.created],
    ['file', info.path],
    ...(info.token
      ? [['token', info.token.uri] as const, ['module', info.token.module] as const]
      : []),
  ]);
}

const PROTECTION_TEXT: Record<KeyInfo['protection'], string> = {
  scrypt: 'under a passphrase',
  token: 'on a token',
  none: 'NOT under a passphrase',
  'public-only': 'not here (public half only)',
};

// ---- export, import --------------------------------------------------------------------------------

interface ExportFlags extends Flags {
  public?: boolean;
  output?: string;
  newPassphraseFile?: string;
  newPassphraseFd?: number;
  newPassphraseEnv?: string;
}

function addExport(key: Command, terminal: Terminal): void {
  const command = key
    .command('export <key>')
    .description('Write a key as text: the public half for others, or the pair as a backup.')
    .option('--public', 'only the public half: what others need to seal disks to you')
    .option('-o, --output <file>', 'write there (mode 0600, never over a file) instead of stdout')
    .addOption(storeOption());
  addPassphraseOptions(command);
  addPassphraseOptions(command, 'new-', 'passphrase of the exported copy')
    .addHelpText(
      'after',
      `
An exported pair is always under a passphrase: that of the store unless a new one is given.
${examples('pqblk key export alice --public -o alice.pub', 'pqblk key export alice -o alice.backup')}`,
    )
    .action(async (reference: string, flags: ExportFlags) => {
      const store = openStore(flags);
      const text = flags.public
        ? await store.exportPublic(reference)
        : await exportPair(store, reference, flags);
      if (flags.output === undefined) terminal.line(text.trimEnd());
      else await writeNew(flags.output, text);
    });
}

async function exportPair(store: KeyStore, reference: string, flags: ExportFlags): Promise<string> {
  const given = {
    ...(flags.newPassphraseFile !== undefined && { passphraseFile: flags.newPassphraseFile }),
    ...(flags.newPassphraseFd !== undefined && { passphraseFd: flags.newPassphraseFd }),
    ...(flags.newPassphraseEnv !== undefined && { passphraseEnv: flags.newPassphraseEnv }),
  };
  using own = await passphraseFor(await store.show(reference), flags);
  // A key without a passphrase of its own takes the one that was given as that of the copy.
  const source = Object.keys(given).length > 0 || own ? given : flags;
  if (own && Object.keys(given).length === 0) return await store.exportPrivate(reference, own, own);
  using copy = await readPassphrase(
    passphraseSource(source, 'Passphrase of the exported copy', true),
  );
  return await store.exportPrivate(reference, own, copy);
}

async function writeNew(path: string, text: string): Promise<void> {
  try {
    await writeFile(path, text, { flag: 'wx', mode: 0o600 });
  } catch (error) {
    throw fromSystem(error, { path, operation: 'write key' });
  }
}

interface ImportFlags extends Flags, TokenFlags {
  name?: string;
  passphrase: boolean;
}

const COULD_LEAVE =
  'the token would let this private key out: it is not sensitive, or extractable; a key that the token makes ' +
  'for `pqblk key gen` is neither';
const PRIVATE_TITLE = 'BEGIN PQBLK PRIVATE KEY';

function addImport(key: Command, terminal: Terminal): void {
  const command = key
    .command('import [file]')
    .description(
      'Take in an exported key (`-` reads stdin), or with --token one that is on a token.',
    )
    .option('--name <name>', 'keep it under another name')
    .option('--no-passphrase', 'keep the private key without its passphrase')
    .addOption(storeOption())
    .addOption(jsonOption());
  addTokenOptions(addPassphraseOptions(command, '', 'passphrase of the exported key'))
    .addHelpText(
      'after',
      examples(
        'pqblk key import bob.pub',
        'pqblk key import alice.backup',
        "pqblk key import vault --token 'pkcs11:token=HSM;object=disks' --module /usr/lib/vendor.so",
      ),
    )
    .action(async (file: string | undefined, flags: ImportFlags) => {
      requireTokenFlags(flags);
      if (flags.token !== undefined) {
        const name = flags.name ?? file;
        const { info, confined } = await importFromToken(openStore(flags), name, flags);
        show(terminal, info, flags);
        if (!confined) terminal.remark(`warning: ${COULD_LEAVE}`);
        return;
      }
      if (file === undefined) throw new PqblkError('usage', 'name the file of an exported key');
      const text = await readKeyText(file);
      using passphrase: Secret | undefined = text.includes(PRIVATE_TITLE)
        ? await readPassphrase(passphraseSource(flags, 'Passphrase of the exported key'))
        : undefined;
      const info = await openStore(flags).import(text, {
        ...(flags.name !== undefined && { name: flags.name }),
        ...(passphrase && { passphrase }),
        ...(!flags.passphrase && { protection: { noPassphrase: true } as const }),
      });
      show(terminal, info, flags);
    });
}

async function readKeyText(file: string): Promise<string> {
  if (file !== '-') return await readInputText(file, KEY_TEXT);
  try {
    return await waitingFor(readAll(process.stdin));
  } catch (error) {
    throw fromSystem(error, { path: file, operation: KEY_TEXT.operation });
  }
}

// ---- delete ----------------------------------------------------------------------------------------

function addDelete(key: Command, terminal: Terminal): void {
  key
    .command('delete <key>')
    .description('Remove a key from the store. Disks sealed to it stay sealed to it.')
    .option('--force', 'delete a private key: what only it opens is lost for good')
    .addOption(storeOption())
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk key delete bob', 'pqblk key delete alice --force'))
    .action(async (reference: string, flags: Flags & { force?: boolean }) => {
      const store = openStore(flags);
      const info = await store.show(reference);
      const here = info.protection === 'scrypt' || info.protection === 'none';
      if (here && !flags.force) {
        throw refuse(
          `"${info.name}" is a private key; disks that only it opens would be lost`,
          '`pqblk key export` makes a backup; --force deletes it all the same',
        );
      }
      await store.delete(info.name);
      if (flags.json) terminal.json({ deleted: info });
      else terminal.line(`deleted ${info.name} (${info.fingerprint.slice(0, SHORT_FINGERPRINT)})`);
      if (info.token) terminal.remark(`the key itself stays on its token: ${info.token.uri}`);
    });
}
