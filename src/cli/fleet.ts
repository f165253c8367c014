// Room cli/: `pqblk fleet rewrap|rotate-master-key`: one change of keys over hundreds of disks.
//
// Every disk is an event, one line of JSON on stdout, and the run is one more at its end. A run has a
// name and a journal, so that it can be stopped, killed and repeated: what is done is skipped. The
// journal is advice about disks, never about keys: whether a disk is done the disk itself tells.
import { createHash } from 'node:crypto';
import { mkdir, open, readFile, realpath, truncate } from 'node:fs/promises';
import { homedir } from 'node:os';
import { isAbsolute, join } from 'node:path';
import { type Command, Option } from 'commander';
import { ERROR_TABLE, type ErrorKind, fromSystem, PqblkError } from '../errors.js';
import {
  type ChangedKeyArea,
  fingerprintOf,
  type Identity,
  type KeyAreaEditor,
  type Recipient,
  takeLock,
  toHex,
} from '../index.js';
import { refuseCopies } from './copies.js';
import { type Candidate, type InventoryFlags, inventory } from './inventory.js';
import { openStore, parseCount, unlockIn } from './options.js';
import {
  addRekeyOptions,
  changeUnder,
  type Keyring,
  keyringOf,
  type RekeyFlags,
  type Rekeying,
  warningsFor,
  withPermitOf,
} from './rekeying.js';
import { editRewrap, type RewrapFlags } from './rewrap.js';
import {
  addSlotOptions,
  hasSlot,
  type NewPassphraseFlags,
  newRecipient,
  testerOf,
} from './slot.js';
import type { Terminal } from './terminal.js';

interface FleetFlags extends RekeyFlags, InventoryFlags {
  key: string;
  jobs: number;
  run?: string;
}

interface MoveFlags extends FleetFlags, RewrapFlags, NewPassphraseFlags {
  to: string;
  force?: boolean;
}

const RUN_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

export function addFleet(program: Command, terminal: Terminal): void {
  const fleet = program
    .command('fleet')
    .description('Change the keys of many disks: one event for each, one line of JSON.')
    .addHelpText(
      'after',
      `
Disks are files, patterns in quotes ('/srv/**/*.sealed'), directories (every sealed disk below), or lines
of --list. Run it again until it fails no more: what is done is skipped. The exit code is that of the
failures when all are of one kind, else 1; 7 when it was stopped.`,
    );
  addRewrap(fleet, terminal);
  addRotate(fleet, terminal);
}

function addFleetOptions(command: Command): Command {
  return addRekeyOptions(command)
    .option('--list <file>', "disks, one on each line; '-' reads stdin")
    .addOption(
      new Option('--jobs <n>', 'disks at a time').argParser((text) => parseCount(text)).default(8),
    );
}

function addRewrap(fleet: Command, terminal: Terminal): void {
  const command = fleet
    .command('rewrap <slot> [disks...]')
    .description('Move a slot of every disk to a new key. Disks that have done so are skipped.')
    .requiredOption('--to <name|file>', 'key that takes its place')
    .option('--keep-old', 'let the former key open until the next rotation of the master key')
    .option('--rotate-master-key', 'change the master key as well')
    .option(
      '--force',
      'though no key at hand opens the disks afterwards: the new one is not tested',
    );
  addSlotOptions(addFleetOptions(command)).action(
    async (slot: string, disks: string[], flags: MoveFlags) => {
      const recipient = await newRecipient(flags.to, flags);
      using tester = await testerOf(flags.to, flags);
      await exclusively(flags, async () => {
        const journal = await Journal.open(rewrapRun(slot, recipient), flags.dryRun === true);
        await runFleet(terminal, disks, flags, (path) => ({
          operation: 'rewrap',
          testers: tester.identities,
          untested: flags.force,
          edit: async (editor) => {
            const moved = hasSlot(editor.slots, recipient);
            const rotateMasterKey =
              flags.rotateMasterKey === true && ((await journal.mayRotate(path, editor)) || !moved);
            editRewrap(editor, slot, recipient, { ...flags, rotateMasterKey });
          },
        }));
      });
    },
  );
}

function addRotate(fleet: Command, terminal: Terminal): void {
  const command = fleet
    .command('rotate-master-key [disks...]')
    .description('Change the master key of every disk, once for each name of a run.')
    .requiredOption('--run <name>', 'name of this rotation: the same name does not rotate twice');
  addFleetOptions(command).action(async (disks: string[], flags: FleetFlags) => {
    await exclusively(flags, async () => {
      const journal = await Journal.named(flags.run as string, flags.dryRun === true);
      await runFleet(terminal, disks, flags, (path) => ({
        operation: 'rotate-master-key',
        edit: async (editor) => {
          if (await journal.mayRotate(path, editor)) editor.rotateMasterKey();
        },
      }));
    });
  });
}

/** Moving a slot has a journal of its own: whether a master key was changed for it no disk tells. */
const rewrapRun = (slot: string, { encapsulationKey }: Recipient) =>
  `.rewrap-${createHash('sha256')
    .update(`${toHex(fingerprintOf(encapsulationKey))} ${slot}`)
    .digest('hex')}`;

/** One run at a time for each user: two would report each other's work as failures. */
async function exclusively(flags: FleetFlags, work: () => Promise<void>): Promise<void> {
  if (flags.dryRun) return await work();
  const directory = join(stateDirectory(), 'fleet');
  await mkdir(directory, { recursive: true, mode: 0o700 });
  const release = await takeLock(join(directory, 'run'), 'begin a run');
  try {
    await work();
  } finally {
    await release();
  }
}

// ---- the run ---------------------------------------------------------------------------------------

interface Summary {
  disks: number;
  done: number;
  skipped: number;
  failed: number;
  seconds: number;
}

async function runFleet(
  terminal: Terminal,
  names: readonly string[],
  flags: FleetFlags,
  rekeyingOf: (path: string) => Rekeying,
): Promise<void> {
  const started = performance.now();
  const disks = await refuseCopies(await inventory(names, flags));
  requireOneLog(disks, flags);
  using keyring = await keyringOf(flags);
  using identity = await unlockOnce(flags);
  const kinds = new Set<ErrorKind>();
  const summary: Summary = { disks: disks.length, done: 0, skipped: 0, failed: 0, seconds: 0 };
  const say = (event: object) => terminal.line(JSON.stringify(event));
  const waiting = disks[Symbol.iterator]();
  const worker = async () => {
    for (const { path, error: unreadable } of waiting) {
      if (terminal.signal.aborted) return;
      try {
        if (unreadable) throw unreadable;
        const changed = await changeOne(keyring, identity, path, flags, rekeyingOf(path));
        summary[changed.changed ? 'done' : 'skipped'] += 1;
        say(eventOf(path, changed));
      } catch (thrown) {
        const error = fromSystem(thrown, { path });
        summary.failed += 1;
        kinds.add(error.kind);
        say({ event: 'failed', path, error: error.toJSON() });
      }
    }
  };
  await Promise.all(Array.from({ length: Math.max(1, flags.jobs) }, worker));
  summary.seconds = Math.round(performance.now() - started) / 1000;
  say({ event: 'summary', ...summary, dryRun: flags.dryRun === true });
  requireComplete(summary, kinds, terminal.signal.aborted);
}

function requireComplete(summary: Summary, kinds: Set<ErrorKind>, stopped: boolean): void {
  if (stopped) {
    throw new PqblkError('interrupted', 'stopped: run it again to go on');
  }
  if (summary.failed === 0) return;
  const [first] = kinds;
  const kind = kinds.size === 1 && first !== undefined ? first : 'general';
  throw new PqblkError(kind, `${summary.failed} of ${summary.disks} disks failed`, {
    hint: `the events name them (${[...kinds].map((one) => ERROR_TABLE[one].code).join(', ')})`,
  });
}

/** A log is of one volume. Kind `usage`. */
function requireOneLog(disks: readonly Candidate[], { audit }: FleetFlags): void {
  if (audit === undefined || disks.length === 1) return;
  throw new PqblkError(
    'usage',
    `--audit names the log of one disk, and these are ${disks.length}`,
    {
      hint: 'a policy with auditDirectory keeps a log for each',
    },
  );
}

/** One key for all disks, so that its passphrase is asked for once. */
async function unlockOnce(flags: FleetFlags): Promise<Identity> {
  if (flags.recoveryCode !== undefined) {
    throw new PqblkError('usage', 'a recovery code opens one disk: change that by itself');
  }
  const reference = [flags.key ?? []].flat()[0];
  if (reference === undefined) {
    throw new PqblkError('usage', 'name the key that opens the disks with --key');
  }
  const store = openStore(flags);
  return await unlockIn(store, reference, flags);
}

async function changeOne(
  keyring: Keyring,
  identity: Identity,
  path: string,
  flags: FleetFlags,
  rekeying: Rekeying,
): Promise<ChangedKeyArea> {
  return await withPermitOf(keyring, identity, path, flags, (permit) =>
    changeUnder(permit, rekeying),
  );
}

function eventOf(path: string, changed: ChangedKeyArea): object {
  const { volumeUuid, before, after, completed, dryRun } = changed;
  const say = ({ generation, vmkCheck, slots }: typeof before) => ({
    generation,
    vmkCheck,
    keys: slots.filter((slot) => slot.state !== 'revoked').map((slot) => slot.fingerprint),
  });
  return {
    event: changed.changed ? (dryRun ? 'planned' : 'done') : 'skipped',
    path,
    volumeUuid,
    ...(completed && { completed }),
    before: say(before),
    ...(changed.changed && { after: say(after) }),
    warnings: warningsFor(changed),
  };
}

// ---- the journal of a rotation -----------------------------------------------------------------------

/** Which master key each disk had when a run began with it: a disk that has it still is not done. */
class Journal {
  readonly #path: string;
  readonly #dryRun: boolean;
  readonly #from = new Map<string, string>();

  private constructor(path: string, dryRun: boolean) {
    this.#path = path;
    this.#dryRun = dryRun;
  }

  /** Of a run that has a name. Kinds `usage`, `corrupt`. */
  static async named(run: string, dryRun: boolean): Promise<Journal> {
    if (RUN_NAME.test(run)) return await Journal.open(run, dryRun);
    throw new PqblkError(
      'usage',
      `${JSON.stringify(run)} is no name of a run: use letters, digits, . _ -`,
    );
  }

  static async open(run: string, dryRun: boolean): Promise<Journal> {
    const journal = new Journal(join(stateDirectory(), 'fleet', `${run}.journal`), dryRun);
    await journal.#read();
    return journal;
  }

  /** False for a disk that this run has rotated. */
  async mayRotate(path: string, editor: KeyAreaEditor): Promise<boolean> {
    const check = toHex(editor.observed.vmkCheck);
    // A copy of a disk has its UUID and a key of its own; another name of it has not.
    const volume = `${await realpath(path)} ${toHex(editor.observed.volumeUuid)}`;
    const from = this.#from.get(volume);
    if (from !== undefined) return from === check;
    this.#from.set(volume, check);
    if (!this.#dryRun) await this.#append(`${JSON.stringify({ volume, from: check })}\n`);
    return true;
  }

  async #append(line: string): Promise<void> {
    const file = await open(this.#path, 'a', 0o600);
    try {
      await file.appendFile(line);
      await file.sync();
    } catch (error) {
      throw fromSystem(error, { path: this.#path, operation: 'write journal' });
    } finally {
      await file.close();
    }
  }

  async #read(): Promise<void> {
    let text = '';
    try {
      text = await readFile(this.#path, 'utf8');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
        throw fromSystem(error, { path: this.#path, operation: 'read journal' });
      }
    }
    const whole = text.slice(0, text.lastIndexOf('\n') + 1);
    // Of a run that was killed while it wrote: nothing was done to that disk.
    if (whole !== text && !this.#dryRun) await truncate(this.#path, Buffer.byteLength(whole));
    for (const line of whole.split('\n')) {
      if (line === '') continue;
      const { volume, from } = parseLine(line, this.#path);
      this.#from.set(volume, from);
    }
  }
}

function parseLine(line: string, path: string): { volume: string; from: string } {
  try {
    const { volume, from } = JSON.parse(line) as Record<string, unknown>;
    if (typeof volume === 'string' && typeof from === 'string') return { volume, from };
  } catch {
    // said below
  }
  throw new PqblkError('corrupt', 'the journal of this run is damaged', {
    path,
    hint: 'take the line out that is no JSON: its disk may be done again; the disks are not at fault',
  });
}

/** $XDG_STATE_HOME/pqblk, else ~/.local/state/pqblk. */
function stateDirectory(): string {
  const state = process.env.XDG_STATE_HOME;
  const base =
    state && isAbsolute(state) ? state : join(process.env.HOME || homedir(), '.local', 'state');
  return join(base, 'pqblk');
}
