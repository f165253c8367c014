// Room cli/: `pqblk audit verify`: what was done to the keys of a disk, and whether that is all.
import type { Command } from 'commander';
import { PqblkError } from '../errors.js';
import {
  type AuditRecord,
  type AuditReport,
  type AuditStanding,
  describeKeyArea,
  formatUuid,
  keyAreaOf,
  openCopies,
  readAuditLog,
  requireOpenable,
  verifyAuditLog,
} from '../index.js';
import { addKeyUse, type KeyUseFlags, unlockKey } from './opening.js';
import { examples, jsonOption, openStore } from './options.js';
import { policyOf } from './policy.js';
import { auditPath, volumeIn } from './rekeying.js';
import type { Terminal } from './terminal.js';

interface Flags extends KeyUseFlags {
  audit?: string;
  unauthenticated?: boolean;
  json?: boolean;
}

export function addAudit(program: Command, terminal: Terminal): void {
  const audit = program
    .command('audit')
    .description('Read and verify the log of what was done to the keys of a disk.');
  const command = audit
    .command('verify <disk>')
    .description('Compare an audit log with the disk: no line removed, changed or moved.')
    .option('--audit <file>', 'the log (default: where the policy says)')
    .option('--unauthenticated', 'without a key: believe what the file says of itself');
  addKeyUse(command)
    .addOption(jsonOption())
    .addHelpText(
      'after',
      `
Lines that the key area does not count belong to one change that did not come about. Exit code 55 when
the log is not whole.
${examples('pqblk audit verify vm.sealed --audit vm.audit --key alice')}`,
    )
    .action(async (path: string, flags: Flags) => {
      const report = await verify(path, flags);
      if (flags.json) terminal.json({ path, ...report });
      else show(terminal, report);
      if (report.findings.length > 0) {
        throw new PqblkError('audit_broken', `${report.findings.length} findings`, {
          path: report.log,
          operation: 'verify audit log',
        });
      }
    });
}

type Report = AuditReport & { readonly log: string };

async function verify(path: string, flags: Flags): Promise<Report> {
  const place = keyAreaOf(path);
  const policy = await policyOf(flags);
  const log = flags.audit ?? (await auditPath(volumeIn(place), policy));
  if (log === undefined) throw new PqblkError('usage', 'name the audit log with --audit');
  const text = await readAuditLog(log);
  const copies = await place.read();
  const volume = formatUuid(copies.volumeUuid);
  if (flags.unauthenticated) {
    const { audit, generation } = describeKeyArea(copies.blob);
    return { log, ...verifyAuditLog(text, volume, audit, generation) };
  }
  const store = openStore(flags);
  using identity = await unlockKey(store, path, flags);
  const { pins } = store;
  using opened = (await openCopies(copies, identity, { ...flags, pins })).opened;
  if (policy) requireOpenable(policy, opened.slot);
  return { log, ...verifyAuditLog(text, volume, opened.audit, opened.generation) };
}

function show(terminal: Terminal, { records, standings, findings, lines, lost }: Report): void {
  const rows = records.map((record, index) => [
    String(record.line),
    record.time.slice(0, 19),
    whoIn(record),
    whatIn(record),
    String(record.generation),
    shortOf(record.unlockedBy),
    record.approvedBy.map(shortOf).join(', '),
    outcome(record.result, standings[index] as AuditStanding),
    slotsIn(record),
  ]);
  terminal.table(
    HEADING,
    rows.map((row) => row.map(printable)),
  );
  for (const finding of findings) terminal.line(`FINDING: ${finding}`);
  if (lost > 0) terminal.line(`WARNING: it begins after a log of ${lost} lines that was lost`);
  if (findings.length === 0) terminal.line(`${lines} lines, whole`);
}

const HEADING = [
  ...['LINE', 'TIME', 'WHO', 'OPERATION', 'GENERATION', 'KEY', 'APPROVED BY', 'RESULT'],
  'SLOTS', // of any width
];

/** `rotate-data-key begun, 1 to 2`: which step, from which epoch to which. */
function whatIn({ operation, rotation }: AuditRecord): string {
  if (!rotation) return operation;
  const { step, fromEpoch, toEpoch } = rotation;
  return `${operation} ${step}, ${fromEpoch} to ${toEpoch}`;
}

/** `2 "bob" 0123456789abcdef: active to revoked`, of each slot whose key or state became another one. */
const slotsIn = ({ slots }: AuditRecord) =>
  slots
    .map(({ index, label, fingerprint, from, to }) => {
      const [state = '', key = ''] = from.split(' ');
      const former = key === '' || key === fingerprint ? state : `${state} ${shortOf(key)}`;
      return `${index} "${label}" ${shortOf(fingerprint)}: ${former} to ${to}`;
    })
    .join('; ');

/** Anybody may have written into the file what a terminal would obey. */
const printable = (text: string) => text.replace(/\p{C}/gu, '\ufffd');

const shortOf = (fingerprint: string) => fingerprint.slice(0, 16);

/** `root@host for alice`: whose rights the process had, and who was behind it as far as that is known. */
function whoIn({ user, host, sudoUser, loginUid }: AuditRecord): string {
  const behind = sudoUser ?? (loginUid === undefined ? undefined : `uid ${loginUid}`);
  return `${user}@${host}${behind === undefined ? '' : ` for ${behind}`}`;
}

const OUTCOMES: Readonly<Record<AuditStanding, string>> = {
  counted: 'counted',
  uncounted: 'did not come about',
  undone: 'undone by a header backup',
  unknown: 'undone by a header backup, or did not come about',
};

const outcome = (result: string, standing: AuditStanding) =>
  result === 'begun' ? OUTCOMES[standing] : result;
