// Room cli/: `pqblk report`: which disks have keys that somebody should look after.
//
// Needs no key, and so believes what the files say of themselves: good enough to find work, and for
// cron. What it finds decides its exit code.
import { type Command, Option } from 'commander';
import { fromSystem, PqblkError } from '../errors.js';
import { diskInfo, type Policy, type SlotDescription, violations } from '../index.js';
import { copiesAmong, forAll } from './copies.js';
import { type Candidate, type InventoryFlags, inventory } from './inventory.js';
import { examples, jsonOption, parseCount } from './options.js';
import { isPast, type PolicyFlags, policyOf, policyOption } from './policy.js';
import type { Terminal } from './terminal.js';

interface Flags extends InventoryFlags, PolicyFlags {
  expiring: number;
  stale: number;
  all?: boolean;
  json?: boolean;
}

type FindingKind =
  | 'unreadable'
  | 'damaged'
  | 'unbelieved'
  | 'policy'
  | 'expired'
  | 'expiring'
  | 'stale'
  | 'unfinished'
  | 'copy';

interface Finding {
  readonly kind: FindingKind;
  readonly message: string;
}

interface DiskReport {
  readonly path: string;
  readonly volumeUuid?: string | undefined;
  readonly generation?: number;
  readonly slots: number;
  readonly findings: readonly Finding[];
}

const NOT_BELIEVED =
  'its header was put back, and no check has believed it yet: the disk is read-only; run `pqblk header ' +
  'restore` again, or `pqblk check`';
const DAY = 86_400_000;

export function addReport(program: Command, terminal: Terminal): void {
  program
    .command('report [disks...]')
    .description('Find stale, expiring and policy-breaking keys of disks, or below directories.')
    .option('--list <file>', "disks, one on each line; '-' reads stdin")
    .addOption(policyOption())
    .addOption(
      new Option('--expiring <days>', 'name slots whose date comes within so many days')
        .argParser((text) => parseCount(text))
        .default(30),
    )
    .addOption(
      new Option('--stale <days>', 'name slots whose key is older than this')
        .argParser((text) => parseCount(text))
        .default(365),
    )
    .option('--all', 'show disks without findings as well')
    .addOption(jsonOption())
    .addHelpText(
      'after',
      `
Exit codes: 0 nothing to do soon (stale and expiring keys, former keys that still open the disk and
unfinished rotations are shown), 6 a policy
is broken or a slot is past its date, 11 a header that was put back and is not believed yet, 18 a damaged
key area, 14 a disk or directory that cannot be read, or a name that stands for nothing, 51 a disk and a copy of it.
${examples('pqblk report /srv/disks', "pqblk report '/srv/**/*.sealed' --policy policy.yaml --json")}`,
    )
    .action(async (names: string[], flags: Flags) => {
      const policy = await policyOf(flags);
      const disks = await inventory(names, flags);
      const reports = await lookAtAll(disks, flags, policy);
      show(terminal, reports, flags);
      requireFine(reports);
    });
}

async function lookAtAll(
  disks: readonly Candidate[],
  flags: Flags,
  policy: Policy | undefined,
): Promise<DiskReport[]> {
  const reports = await forAll(disks, (disk) => lookAt(disk, flags, policy));
  const copies = copiesAmong(reports);
  return reports.map((report) => {
    const message = copies.get(report.path);
    if (message === undefined) return report;
    return { ...report, findings: [...report.findings, { kind: 'copy', message }] };
  });
}

async function lookAt(
  { path, error }: Candidate,
  flags: Flags,
  policy: Policy | undefined,
): Promise<DiskReport> {
  try {
    if (error) throw error;
    const { sealed, qcow2 } = await diskInfo(path, 'sealed');
    const findings: Finding[] = [];
    const add = (kind: FindingKind, message: string) => findings.push({ kind, message });
    if (qcow2?.corrupt) add('unbelieved', NOT_BELIEVED);
    if (!sealed?.keyArea) {
      add('damaged', 'both copies of the key area are damaged');
      return { path, volumeUuid: sealed?.uuid, slots: 0, findings };
    }
    const { slots, generation, currentEpoch, nextEpoch } = sealed.keyArea;
    for (const message of sealed.keyAreaFindings) add('damaged', message);
    if (nextEpoch !== undefined) {
      const what = `a rotation of the data key from epoch ${currentEpoch} to ${nextEpoch}`;
      add('unfinished', `${what} is under way, or was stopped`);
    }
    for (const { rule, message } of policy ? violations(policy, slots) : []) {
      if (rule !== 'not-after') add('policy', message); // said below, with or without a policy
    }
    for (const slot of slots) findings.push(...findingsIn(slot, flags));
    const active = slots.filter((slot) => slot.state === 'active').length;
    return { path, volumeUuid: sealed.uuid, generation, slots: active, findings };
  } catch (thrown) {
    const { message } = fromSystem(thrown, { path });
    return { path, slots: 0, findings: [{ kind: 'unreadable', message }] };
  }
}

function findingsIn(slot: SlotDescription, flags: Flags): Finding[] {
  if (slot.state === 'active') return datesOf(slot, flags);
  if (slot.state !== 'decrypt-only') return [];
  const what = `slot ${slot.index} ("${slot.label}") is decrypt-only, and its key still opens the disk`;
  const past = isPast(slot) ? `, past its date, ${slot.notAfter}` : '';
  const message = `${what}${past}; \`pqblk rotate-master-key\` ends it`;
  return [{ kind: past === '' ? 'stale' : 'expired', message }];
}

function datesOf(slot: SlotDescription, { expiring, stale }: Flags): Finding[] {
  const now = Date.now();
  const name = `slot ${slot.index} ("${slot.label}")`;
  const findings: Finding[] = [];
  if (isPast(slot)) {
    findings.push({ kind: 'expired', message: `${name} is past its date, ${slot.notAfter}` });
  } else if (isPast(slot, now + expiring * DAY)) {
    findings.push({ kind: 'expiring', message: `${name} ends on ${slot.notAfter?.slice(0, 10)}` });
  }
  if (Date.parse(slot.created) < now - stale * DAY) {
    const since = slot.created.slice(0, 10);
    findings.push({ kind: 'stale', message: `${name} has had its key since ${since}` });
  }
  return findings;
}

function show(terminal: Terminal, reports: readonly DiskReport[], { all, json }: Flags): void {
  const found = reports.filter(({ findings }) => findings.length > 0);
  if (json) {
    terminal.json({ looked: reports.length, disks: all ? reports : found });
    return;
  }
  const rows = (all ? reports : found).flatMap(({ path, slots, findings }) =>
    (findings.length > 0 ? findings : [{ kind: 'fine', message: `${slots} active slots` }]).map(
      ({ kind, message }) => [path, kind, message],
    ),
  );
  if (rows.length > 0) terminal.table(['DISK', 'FINDING', 'WHAT'], rows);
  terminal.remark(`${reports.length} disks, ${found.length} with findings`);
}

function requireFine(reports: readonly DiskReport[]): void {
  const count = (...kinds: FindingKind[]) =>
    reports.filter(({ findings }) => findings.some(({ kind }) => kinds.includes(kind))).length;
  const [unreadable, damaged] = [count('unreadable'), count('damaged')];
  const unbelieved = count('unbelieved');
  const broken = count('policy', 'expired');
  if (unreadable > 0) throw new PqblkError('io_error', `${unreadable} disks cannot be read`);
  if (damaged > 0) throw new PqblkError('key_area_damaged', `${damaged} damaged key areas`);
  if (unbelieved > 0) {
    throw new PqblkError(
      'corrupt',
      `${unbelieved} headers were put back, and are not believed yet`,
    );
  }
  if (broken > 0) throw new PqblkError('policy', `${broken} disks break the rules for keys`);
  const copies = count('copy');
  if (copies > 0) throw new PqblkError('ambiguous', `${copies} disks are copies of each other`);
}
