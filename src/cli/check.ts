// Room cli/: `pqblk check`: is a disk whole?
import type { Command } from 'commander';
import { type ErrorKind, PqblkError } from '../errors.js';
import { type CheckResult, checkDisk, type KeyAreaEditor, type LongWork } from '../index.js';
import { addOpenOptions, formatOf, keyOption, type OpenFlags, unlocking } from './opening.js';
import { examples, jsonOption } from './options.js';
import { policyOf, slotChecker } from './policy.js';
import {
  type ApproveFlags,
  addApproveOptions,
  auditOption,
  changeUnder,
  type Permit,
  restartAuditOption,
  withPermit,
} from './rekeying.js';
import { formatSize, grownWarning } from './sizes.js';
import type { Terminal } from './terminal.js';

interface Flags extends OpenFlags, ApproveFlags {
  repair?: boolean;
  audit?: string;
  restartAudit?: boolean;
  json?: boolean;
}

export function addCheck(program: Command, terminal: Terminal): void {
  const command = program
    .command('check <disk>')
    .description(
      'Check structure, reference counts and, of a sealed disk, the tag of every sector.',
    )
    .option('--repair', 'mend leaks and reference counts; the content is never touched')
    .addOption(keyOption());
  addApproveOptions(addOpenOptions(command))
    .addOption(auditOption())
    .addOption(restartAuditOption())
    .addOption(jsonOption())
    .addHelpText(
      'after',
      `
The report is printed whatever is found. Exit codes: 0 whole, 1 only leaked space, 5 sectors whose
tags do not hold, 11 damaged structure, or a header that was put back and is not believed yet, 14
sectors that the medium does not give out. A repair that --confirm-vmk makes choose between two copies of
the key area is a header-restore to policy and audit log.
${examples('pqblk check vm.sealed --key alice', 'pqblk check vm.qcow2 --repair --json')}`,
    )
    .action(async (path: string, flags: Flags) => {
      const result = await check(terminal, path, flags);
      const warnings = grownWarning(result.grownTo);
      if (flags.json) terminal.json({ path, ...result, warnings });
      else show(terminal, result);
      if (!flags.json) for (const warning of warnings) terminal.remark(`warning: ${warning}`);
      const finding = findingIn(result);
      if (!finding) return;
      const [kind, message, hint] = finding;
      throw new PqblkError(kind, message, { path, operation: 'check', hint });
    });
}

async function check(terminal: Terminal, path: string, flags: Flags): Promise<CheckResult> {
  const { repair = false, confirmVmk } = flags;
  const overrules = repair && confirmVmk !== undefined && formatOf(path, flags) === 'sealed';
  const bar = terminal.progress('check', 'steps');
  const work = { repair, onProgress: bar.update, signal: terminal.signal };
  try {
    if (overrules)
      return await withPermit(path, flags, (permit) => overrule(path, flags, permit, work));
    using unlocked = await unlocking(path, flags);
    return await checkDisk(path, { ...unlocked.options, ...work });
  } finally {
    bar.stop();
  }
}

/** With a word on which copy of the key area is the right one: it may bring back keys that were revoked. */
async function overrule(
  path: string,
  flags: Flags,
  permit: Permit,
  work: LongWork & { repair: boolean },
): Promise<CheckResult> {
  const { identity, pins, allowRollback, confirmVmk } = permit.options;
  return await checkDisk(path, {
    ...{ format: 'sealed', identity, pins, allowRollback, confirmVmk, ...work },
    onSlot: slotChecker(await policyOf(flags)),
    overrule: async ({ dryRun }) => {
      const change = {
        operation: 'header-restore',
        edit: (editor: KeyAreaEditor) => editor.renew(),
      } as const;
      await changeUnder(
        { ...permit, options: { ...permit.options, dryRun, overrules: true } },
        change,
      );
    },
  });
}

const NEWER_BACKUP = '`pqblk header restore` with a newer backup, or --force';
const MEDIUM_FAILS = 'the medium fails: move the disk, and restore or discard these sectors';
const REPAIR_BELIEVES = 'it fits the disk: `pqblk check --repair` believes it';

/** The worst that was found, as the kind whose exit code the command ends with, and what to do about it. */
function findingIn(result: CheckResult): [ErrorKind, string, (string | undefined)?] | undefined {
  const { sectorsBad, sectorsUnreadable, corruptions, leaks, headerPutBack } = result;
  const hint = headerPutBack ? NEWER_BACKUP : undefined;
  if (sectorsBad > 0) return ['integrity', `${sectorsBad} sectors do not authenticate`, hint];
  if (corruptions > 0) return ['corrupt', `${corruptions} errors in the structure`, hint];
  if (sectorsUnreadable > 0) {
    return ['io_error', `${sectorsUnreadable} sectors cannot be read`, hint ?? MEDIUM_FAILS];
  }
  if (headerPutBack) {
    const fits = leaks === 0;
    const not = fits ? '' : `: ${leaks} clusters that it does not refer to`;
    const what = `its header was put back, and is not believed yet${not}`;
    return ['corrupt', what, fits ? REPAIR_BELIEVES : NEWER_BACKUP];
  }
  if (leaks > 0) return ['general', `${leaks} clusters of space leaked; --repair frees them`];
  return undefined;
}

function show(terminal: Terminal, result: CheckResult): void {
  for (const message of result.messages) terminal.line(message);
  for (const sector of result.badSectors) {
    terminal.line(`sector ${sector} (byte ${sector * 4096}) does not authenticate`);
  }
  for (const sector of result.unreadableSectors) {
    terminal.line(`sector ${sector} (byte ${sector * 4096}) cannot be read`);
  }
  const { allocatedClusters, totalClusters, sectorsVerified, corruptionsFixed, leaksFixed } =
    result;
  terminal.fields([
    [
      'allocated',
      totalClusters > 0 ? `${allocatedClusters} of ${totalClusters} clusters` : undefined,
    ],
    ['image end', formatSize(result.imageEnd)],
    ['tags verified', sectorsVerified > 0 ? `${sectorsVerified} sectors` : undefined],
    ['errors mended', corruptionsFixed > 0 ? String(corruptionsFixed) : undefined],
    ['leaks mended', leaksFixed > 0 ? String(leaksFixed) : undefined],
    ['errors', String(result.corruptions + result.sectorsBad + result.sectorsUnreadable)],
    ['leaked clusters', String(result.leaks)],
  ]);
}
