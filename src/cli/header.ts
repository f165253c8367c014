// Room cli/: `pqblk header backup|restore`.
import type { Command } from 'commander';
import {
  backUpHeader,
  chooseKey,
  describeKeyArea,
  formatUuid,
  type Identity,
  isOutdated,
  isPinsWord,
  type KeyStore,
  openCopies,
  openKeyArea,
  PqblkError,
  type RestoredHeader,
  type RestoredSlots,
  readHeaderBackup,
  requireAllowed,
  requireApprover,
  requireOpenable,
  restoreHeader,
  type SlotDescription,
  writeHeaderBackup,
} from '../index.js';
import { addKeyUse, type KeyUseFlags, recoveryKey } from './opening.js';
import { examples, jsonOption, openStore, unlockIn } from './options.js';
import { policyOf } from './policy.js';
import {
  type ApproveFlags,
  addApproveOptions,
  approversOf,
  auditOf,
  auditOption,
  restartAuditOption,
  showSlots,
} from './rekeying.js';
import { grownWarning } from './sizes.js';
import type { Terminal } from './terminal.js';

interface RestoreFlags extends KeyUseFlags, ApproveFlags {
  audit?: string;
  restartAudit?: boolean;
  keepKeyArea?: boolean;
  force?: boolean;
  json?: boolean;
}

export function addHeader(program: Command, terminal: Terminal): void {
  const header = program
    .command('header')
    .description('Take aside, and put back, what a sealed disk cannot be opened without.');
  addBackup(header, terminal);
  addRestore(header, terminal);
}

const OPENS_FOR_EVER =
  'whoever can open the disk now can open it with this backup for ever, revoked or not: keep it like ' +
  'the disk, and make a new one after each change of keys';

function addBackup(header: Command, terminal: Terminal): void {
  header
    .command('backup <disk> <file>')
    .description('Write header, session table and key area to a new file. The disk may be in use.')
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk header backup vm.sealed vm.header'))
    .action(async (path: string, file: string, flags: { json?: boolean }) => {
      const backup = await backUpHeader(path);
      await writeHeaderBackup(file, backup);
      const { slots, generation } = describeKeyArea(backup.keyArea);
      const volumeUuid = formatUuid(backup.volumeUuid);
      if (flags.json) {
        terminal.json({ path, file, volumeUuid, generation, slots, warnings: [OPENS_FOR_EVER] });
        return;
      }
      terminal.line(`header of volume ${volumeUuid}, generation ${generation}, in ${file}`);
      terminal.remark(`warning: ${OPENS_FOR_EVER}`);
    });
}

function addRestore(header: Command, terminal: Terminal): void {
  const command = header
    .command('restore <disk> <file>')
    .description('Put a backup back. A header that can be read is never touched.')
    .option('--keep-key-area', 'put back header and sessions only')
    .option(
      '--force',
      'though data keys on the disk, which the backup lacks or may lack, would be lost',
    );
  addApproveOptions(addKeyUse(command))
    .addOption(auditOption())
    .addOption(restartAuditOption())
    .addOption(jsonOption())
    .addHelpText(
      'after',
      `
The key area is replaced by that of the backup: slots that were revoked since open again, and those that
were added since are gone; with --keep-key-area the disk's own stays. A backup that is older than what this host has seen needs --allow-rollback,
and --confirm-vmk when the master key was another one.
${examples('pqblk header restore vm.sealed vm.header --key alice')}`,
    )
    .action(async (path: string, file: string, flags: RestoreFlags) => {
      const restored = await restore(terminal, path, file, flags);
      report(terminal, path, restored, flags);
    });
}

async function restore(
  terminal: Terminal,
  path: string,
  file: string,
  flags: RestoreFlags,
): Promise<RestoredHeader> {
  const backup = await readHeaderBackup(file);
  const store = openStore(flags);
  const policy = await policyOf(flags);
  const { slots } = describeKeyArea(backup.keyArea);
  using identity = await identityFor(store, slots, flags);
  using approvers = await approversOf(flags, async () => slots);
  const audit = await auditOf(async () => backup.volumeUuid, flags, policy);
  const approvedBy: string[] = [];
  const { allowRollback, confirmVmk, force, keepKeyArea } = flags;
  const pins = { pins: store.pins, allowRollback, confirmVmk };
  const approve = async ({ before, after, present }: RestoredSlots) => {
    // While the disk's own key area is whole it says who has a word; a backup knows who had.
    // Whatever it is that takes two persons: a restore amounts to any of it.
    const restricted =
      policy !== undefined && policy.twoPersons.length > 0 && present !== undefined;
    const slotOf = async (one: Identity) => {
      const inBackup = async () => await openKeyArea(backup.keyArea, one);
      if (!restricted) {
        using opened = await inBackup();
        return opened.slot;
      }
      try {
        const words = keepKeyArea ? { allowRollback, confirmVmk } : {};
        using opened = (await openCopies(present, one, { pins: store.pins, ...words })).opened;
        return opened.slot;
      } catch (error) {
        // An old one that was put back has no word, least of all against the backup that the pin knows.
        if (!(error instanceof PqblkError && isPinsWord(error))) throw error;
        using opened = await inBackup();
        if (!(await isOutdated(present, opened, one, store.pins))) throw error;
        return opened.slot;
      }
    };
    const own = policy && (await slotOf(identity));
    if (own) requireOpenable(policy, own);
    if (own && restricted) requireApprover(own, policy);
    for (const approver of approvers.identities) {
      const slot = await slotOf(approver);
      requireApprover(slot, policy);
      const { fingerprint } = slot;
      if (!Buffer.from(approver.fingerprint).equals(identity.fingerprint)) {
        approvedBy.push(fingerprint);
      }
    }
    if (!policy) return;
    const operation = 'header-restore';
    const log = { audited: audit !== undefined, restartsAudit: audit?.restarts };
    requireAllowed(policy, { operation, before, after, approvedBy, ...log });
  };
  const bar = terminal.progress('check', 'steps');
  try {
    return await restoreHeader(path, backup, {
      ...{ identity, ...pins, keepKeyArea, force, approve, audit, approvedBy },
      onProgress: bar.update,
      signal: terminal.signal,
    });
  } finally {
    bar.stop();
  }
}

/** The key that opens the backup's key area. */
async function identityFor(
  store: KeyStore,
  slots: readonly SlotDescription[],
  flags: RestoreFlags,
): Promise<Identity> {
  if (flags.recoveryCode !== undefined) return await recoveryKey(slots, flags.recoveryCode);
  const reference = [flags.key ?? []].flat()[0] ?? (await chooseKey(store, slots)).fingerprint;
  return await unlockIn(store, reference, flags);
}

function report(
  terminal: Terminal,
  path: string,
  restored: RestoredHeader,
  { json }: RestoreFlags,
): void {
  const warnings = warningsFor(restored);
  if (json) {
    terminal.json({ path, ...restored, warnings });
    return;
  }
  const { header, sessions, keyArea, after } = restored;
  terminal.fields([
    ['header', header ? 'put back: it was unreadable' : 'untouched'],
    ['sessions', sessions > 0 ? `${sessions} put back` : 'all there'],
    ['key area', keyArea ? 'that of the backup' : 'as it was'],
  ]);
  terminal.line();
  showSlots(terminal, after);
  for (const warning of warnings) terminal.remark(`warning: ${warning}`);
}

/** Slots that open again, and those that are gone. */
function warningsFor({ before = [], after, grownTo }: RestoredHeader): string[] {
  const opens = (slots: readonly SlotDescription[], { fingerprint }: SlotDescription) =>
    slots.some((slot) => slot.fingerprint === fingerprint && slot.state !== 'revoked');
  const named = ({ label, fingerprint }: SlotDescription) =>
    `"${label}" (${fingerprint.slice(0, 16)})`;
  const back = after.filter((slot) => opens(after, slot) && !opens(before, slot));
  const gone = before.filter((slot) => opens(before, slot) && !opens(after, slot));
  return [
    ...grownWarning(grownTo),
    ...(before.length > 0 ? back.map((slot) => `${named(slot)} opens the disk again`) : []),
    ...gone.map((slot) => `${named(slot)} opens the disk no more`),
  ];
}
