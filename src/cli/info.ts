// Room cli/: `pqblk info`: what anyone may know of a disk, without a key.
import { type Command, Option } from 'commander';
import {
  type DiskFormat,
  type DiskInfo,
  diskInfo,
  type EngineInfo,
  engineInfo,
  type SealedInfo,
} from '../index.js';
import { FORMATS } from './opening.js';
import { examples, jsonOption } from './options.js';
import { formatSize } from './sizes.js';
import type { Terminal } from './terminal.js';

const SHORT_FINGERPRINT = 16;

interface Flags {
  format?: DiskFormat;
  json?: boolean;
}

export function addInfo(program: Command, terminal: Terminal): void {
  program
    .command('info <path>')
    .description('Show what a disk is: format, sizes, key slots, lock, durability. Needs no key.')
    .addOption(
      new Option(
        '--format <format>',
        'take it for this (default: as its first bytes say, which is for showing only)',
      ).choices(FORMATS),
    )
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples('pqblk info vm.sealed', 'pqblk info old.img --format raw --json'),
    )
    .action(async (path: string, flags: Flags) => {
      await showInfo(terminal, await diskInfo(path, flags.format), flags.json);
    });
}

export async function showInfo(terminal: Terminal, info: DiskInfo, json?: boolean): Promise<void> {
  const engine = await engineInfo();
  if (json) {
    terminal.json({ ...info, engine });
    return;
  }
  terminal.fields([
    ['path', info.path],
    ['format', formatText(info)],
    ['size', sizeText(info.size)],
    ['on the host', `${sizeText(info.allocatedBytes)} of a file of ${formatSize(info.fileSize)}`],
    ['cluster size', info.clusterSize > 0 ? formatSize(info.clusterSize) : undefined],
    ...(info.sealed ? sealedFields(info.sealed) : []),
    ...qcow2Fields(info),
    ['lock', lockText(info)],
    ['engine', engineText(engine)],
    ['durability', info.durabilityClass],
  ]);
  if (info.sealed) showSlots(terminal, info.sealed);
}

type Fields = [string, string | undefined][];

const sizeText = (bytes: number) => `${formatSize(bytes)} (${bytes} bytes)`;

function formatText({ format, qcow2, sealed }: DiskInfo): string {
  if (sealed) return `sealed, version ${sealed.formatVersion}`;
  return qcow2 ? `${format}, version ${qcow2.version}` : format;
}

function backingText(name: string | undefined, format: string | undefined): string | undefined {
  return name && (format ? `${name} (${format})` : name);
}

function sealedFields(sealed: SealedInfo): Fields {
  const damaged = sealed.keyAreaCopyDamaged.filter(Boolean).length;
  const area = `generation ${sealed.keyAreaGeneration}`;
  return [
    ['encryption', sealed.suite],
    ['volume', sealed.uuid],
    ['closed cleanly', sealed.clean ? 'yes' : 'no: the next open recovers it'],
    ['log', formatSize(sealed.logBytes)],
    ['sessions', String(sealed.sessions)],
    ['key area', damaged === 0 ? area : `${area}, ${damaged} of 2 copies DAMAGED`],
    ['data key', dataKeyText(sealed)],
    ...sealed.keyAreaFindings.map((found): [string, string] => ['', `DAMAGE: ${found}`]),
    [
      'backing file',
      backingText(
        sealed.backingName,
        `${sealed.backingFormat ?? ''} ${sealed.backingPolicy}`.trim(),
      ),
    ],
  ];
}

function dataKeyText({ keyArea }: SealedInfo): string | undefined {
  if (!keyArea) return undefined;
  const { currentEpoch, nextEpoch } = keyArea;
  const now = `epoch ${currentEpoch}`;
  if (nextEpoch === undefined) return now;
  return `${now}; a rotation to epoch ${nextEpoch} is under way, or was stopped: \`pqblk rotate-data-key\` goes on with it`;
}

function qcow2Fields({ qcow2 }: DiskInfo): Fields {
  if (!qcow2) return [];
  const state = [
    qcow2.corrupt ? 'marked CORRUPT' : '',
    qcow2.dirty ? 'refcounts not up to date' : '',
  ].filter(Boolean);
  return [
    ['refcounts', `${qcow2.refcountBits} bits${qcow2.lazyRefcounts ? ', lazy' : ''}`],
    ['extended L2', qcow2.extendedL2 ? 'yes' : undefined],
    ['compression', qcow2.compression],
    ['snapshots', qcow2.snapshots > 0 ? String(qcow2.snapshots) : undefined],
    ['state', state.join(', ') || undefined],
    ['backing file', backingText(qcow2.backingName, qcow2.backingFormat)],
  ];
}

function lockText({ lockHolder }: DiskInfo): string {
  if (!lockHolder) return 'free';
  const { pid, command } = lockHolder;
  return pid > 0 ? `held by process ${pid} (${command})` : 'held';
}

function engineText({ engine, fallbackCause }: EngineInfo): string {
  return fallbackCause ? `${engine} (${fallbackCause})` : engine;
}

function showSlots(terminal: Terminal, { keyArea }: SealedInfo): void {
  if (!keyArea) return;
  terminal.line();
  terminal.table(
    ['SLOT', 'LABEL', 'ROLE', 'STATE', 'KEM', 'FINGERPRINT', 'CREATED'],
    keyArea.slots.map((slot) => [
      String(slot.index),
      slot.label,
      slot.role,
      slot.state,
      slot.kem,
      slot.fingerprint.slice(0, SHORT_FINGERPRINT),
      slot.created.slice(0, 10),
    ]),
  );
}
