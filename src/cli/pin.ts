// Room cli/: `pqblk pin list|export|import`: what a host remembers of the disks that it opened, for another host.
import { writeFile } from 'node:fs/promises';
import type { Command } from 'commander';
import { fromSystem, PqblkError } from '../errors.js';
import { parseUuid, readInputText, type VolumePin } from '../index.js';
import { examples, jsonOption, openStore, type StoreFlags, storeOption } from './options.js';
import type { Terminal } from './terminal.js';

const FORMAT = 'pqblk-pins';
const VERSION = 1;
/** Some 100,000 disks. */
const BYTES_MAX = 32 * 2 ** 20;
const SHORT_CHECK = 16;

interface Flags extends StoreFlags {
  json?: boolean;
}

export function addPin(program: Command, terminal: Terminal): void {
  const pin = program
    .command('pin')
    .description('Tell another host that the master keys of disks were rotated.')
    .addHelpText(
      'after',
      `
Each host remembers generation, epoch and a check value of the master key of every disk that it opened, and
opens nothing older and under no other master key. After a rotation elsewhere, take the pins of the host that
rotated to the others, by a way that the disks do not take: nothing in the file is secret, but who can
change it can have an old disk believed.`,
    );
  addList(pin, terminal);
  addExport(pin, terminal);
  addImport(pin, terminal);
}

function addList(pin: Command, terminal: Terminal): void {
  pin
    .command('list')
    .description('List what this key store remembers of each disk.')
    .addOption(storeOption())
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk pin list'))
    .action(async (flags: Flags) => {
      const pins = await openStore(flags).pins.list();
      if (flags.json) terminal.json({ pins });
      else {
        const rows = pins.map(({ volumeUuid, generation, epoch, vmkCheck }) => [
          ...[volumeUuid, String(generation), String(epoch), vmkCheck.slice(0, SHORT_CHECK)],
        ]);
        terminal.table(['VOLUME', 'GENERATION', 'EPOCH', 'MASTER KEY'], rows);
      }
    });
}

function addExport(pin: Command, terminal: Terminal): void {
  pin
    .command('export [volumes...]')
    .description('Write the pins of these volumes (UUIDs), or of all, for `pqblk pin import`.')
    .option('-o, --output <file>', 'write there (never over a file) instead of stdout')
    .addOption(storeOption())
    .addHelpText('after', examples('pqblk pin export -o rotated.pins'))
    .action(async (volumes: string[], flags: Flags & { output?: string }) => {
      const all = await openStore(flags).pins.list();
      const missing = volumes.find((one) => !all.some(({ volumeUuid }) => volumeUuid === one));
      if (missing !== undefined) {
        throw new PqblkError('not_found', `no pin of volume ${JSON.stringify(missing)}`, {
          hint: '`pqblk pin list` shows what there is',
        });
      }
      const pins = all
        .filter(({ volumeUuid }) => volumes.length === 0 || volumes.includes(volumeUuid))
        .map(({ volumeUuid, generation, epoch, vmkCheck }) => {
          return { volumeUuid, generation, epoch, vmkCheck };
        });
      const document = { format: FORMAT, version: VERSION, pins };
      if (flags.output === undefined) {
        terminal.json(document);
        return;
      }
      const { output: path } = flags;
      await writeFile(path, `${JSON.stringify(document, null, 2)}\n`, { flag: 'wx' }).catch(
        (error: unknown) => {
          throw fromSystem(error, { path, operation: 'write pins' });
        },
      );
      terminal.remark(`${pins.length} pins in ${path}`);
    });
}

function addImport(pin: Command, terminal: Terminal): void {
  pin
    .command('import <file>')
    .description('Believe the pins of another host, also of disks with another master key by now.')
    .option('--allow-rollback', 'also where they are older than what this host has seen')
    .addOption(storeOption())
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk pin import rotated.pins'))
    .action(async (path: string, flags: Flags & { allowRollback?: boolean }) => {
      const { pins } = openStore(flags);
      const given = parsePins(await readInputText(path, LIMITS), path);
      const changed: string[] = [];
      const older: string[] = [];
      for (const one of given) {
        try {
          if (await pins.adopt(one, flags)) changed.push(one.volumeUuid);
        } catch (error) {
          if (!(error instanceof PqblkError && error.kind === 'rollback')) throw error;
          older.push(one.volumeUuid); // this host has seen more of it: no reason to leave out the rest
        }
      }
      const unchanged = given.length - changed.length - older.length;
      if (flags.json) terminal.json({ changed, unchanged, older });
      else terminal.line(`${changed.length} pins taken over, ${unchanged} are known already`);
      if (older.length === 0) return;
      throw new PqblkError('rollback', `older than what this host has seen: ${older.join(', ')}`, {
        path,
        operation: 'import pins',
        hint: 'all others were looked at; --allow-rollback, with a file of such a volume alone, accepts it',
      });
    });
}

const LIMITS = { operation: 'read pins', bytesMax: BYTES_MAX } as const;

/** Every pin is looked at before the first is believed. Kind `corrupt`. */
function parsePins(text: string, path: string): VolumePin[] {
  const corrupt = (what: string) =>
    new PqblkError('corrupt', `no pins of pqblk: ${what}`, { path, operation: 'read pins' });
  let value: { format?: unknown; version?: unknown; pins?: unknown } | null;
  try {
    value = JSON.parse(text);
  } catch {
    throw corrupt('not JSON');
  }
  if (value?.format !== FORMAT || !Array.isArray(value.pins)) throw corrupt('another document');
  if (value.version !== VERSION) {
    throw new PqblkError('newer_version', `pins of version ${value.version}`, { path });
  }
  return value.pins.map((one: Partial<VolumePin> | null, index) => {
    const natural = (number: unknown) => Number.isSafeInteger(number) && Number(number) >= 1;
    const { volumeUuid = '', generation, epoch, vmkCheck = '' } = one ?? {};
    const texts = typeof vmkCheck === 'string' && typeof volumeUuid === 'string';
    const numbers = natural(generation) && natural(epoch);
    if (
      !texts ||
      !numbers ||
      !/^[0-9a-f]{64}$/.test(vmkCheck) ||
      !/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(volumeUuid)
    ) {
      throw corrupt(`pin ${index + 1}`);
    }
    parseUuid(volumeUuid);
    return { volumeUuid, generation, epoch, vmkCheck } as VolumePin;
  });
}
