// Room cli/: options that say what a new disk shall be, shared by `create` and `import`.
import { join } from 'node:path';
import { type Command, Option } from 'commander';
import { PqblkError } from '../errors.js';
import {
  AuditLog,
  type CreateDiskOptions,
  type DiskFormat,
  describeRecipients,
  formatUuid,
  type KeyStore,
  type Policy,
  type Preallocation,
  type Recipient,
  requireAllowed,
  SlotRole,
} from '../index.js';
import { collect, openStore, recipientOf, type StoreFlags, sizeArgument } from './options.js';
import { type PolicyFlags, policyOf } from './policy.js';

const PREALLOCATIONS: readonly Preallocation[] = ['off', 'metadata', 'falloc', 'full'];
const SUITES = {
  'aes-256-gcm': 'AES-256-GCM',
  'chacha20-poly1305': 'ChaCha20-Poly1305',
} as const;

/** Options of `create` and `import` that mean something for these formats only. */
const ONLY_FOR: Readonly<Record<string, readonly DiskFormat[]>> = {
  key: ['sealed'],
  recoveryKey: ['sealed'],
  suite: ['sealed'],
  logSize: ['sealed'],
  audit: ['sealed'],
  clusterSize: ['qcow2', 'sealed'],
  backing: ['qcow2', 'sealed'],
  backingFormat: ['qcow2', 'sealed'],
  refcountBits: ['qcow2'],
  extendedL2: ['qcow2'],
  compat: ['qcow2'],
};

export interface MakeFlags extends StoreFlags, PolicyFlags {
  key?: string[];
  recoveryKey?: string[];
  suite?: keyof typeof SUITES;
  clusterSize?: number;
  logSize?: number;
  preallocation?: Preallocation;
  force?: boolean;
  audit?: string;
}

export function addMakeOptions(command: Command): Command {
  return command
    .addOption(
      new Option(
        '--key <name|file>',
        'sealed: who may open it, a key of the store or a file of `pqblk key export` (with a slash in ' +
          'its name); may be repeated',
      ).argParser(collect),
    )
    .addOption(
      new Option(
        '--recovery-key <name|file>',
        'sealed: the same, for a key that is kept away for the day when the others are lost',
      ).argParser(collect),
    )
    .addOption(
      new Option('--suite <suite>', 'sealed: cipher (default: aes-256-gcm)').choices(
        Object.keys(SUITES),
      ),
    )
    .addOption(
      new Option('--cluster-size <size>', 'unit of allocation (default: 64K)').argParser(
        sizeArgument,
      ),
    )
    .addOption(
      new Option('--log-size <size>', 'sealed: write log (default: 0.1 %, 8M to 256M)').argParser(
        sizeArgument,
      ),
    )
    .option(
      '--audit <file>',
      'sealed: log of its keys, to begin here (default: where the policy says)',
    )
    .addOption(
      new Option(
        '--preallocation <mode>',
        'how much space is taken at once (default: off)',
      ).choices(PREALLOCATIONS),
    );
}

/** The options of createDisk. Kind `no_key` for a sealed disk that nobody could open. */
export async function makeOptions(
  format: DiskFormat,
  size: number,
  flags: MakeFlags,
): Promise<CreateDiskOptions> {
  requireFitting(format, flags);
  const { clusterSize, logSize, preallocation, suite, force } = flags;
  const store = openStore(flags);
  const sealed = format === 'sealed' && (await sealedOptions(store, flags));
  return {
    format,
    size,
    ...sealed,
    ...(clusterSize !== undefined && { clusterSize }),
    ...(logSize !== undefined && { logBytes: logSize }),
    ...(preallocation !== undefined && { preallocation }),
    ...(suite !== undefined && { suite: SUITES[suite] }),
    ...(force && { overwrite: true, allowSystemDirectory: true }),
  };
}

async function sealedOptions(
  store: KeyStore,
  flags: MakeFlags,
): Promise<Partial<CreateDiskOptions>> {
  const policy = await policyOf(flags);
  const { audit } = flags;
  const directory = policy?.auditDirectory;
  const log = (volumeUuid: Uint8Array) =>
    new AuditLog(audit ?? join(directory ?? '', `${formatUuid(volumeUuid)}.log`));
  const isAudited = audit !== undefined || directory !== undefined;
  return {
    recipients: await recipientsOf(store, flags, policy),
    pins: store.pins,
    ...(isAudited && { audit: log }),
  };
}

/** Those who may open the new disk, as the policy allows. */
async function recipientsOf(
  store: KeyStore,
  flags: MakeFlags,
  policy: Policy | undefined,
): Promise<Recipient[]> {
  const recipients: Recipient[] = [];
  for (const key of flags.key ?? []) recipients.push(await recipientOf(store, key));
  for (const key of flags.recoveryKey ?? []) {
    recipients.push({ ...(await recipientOf(store, key)), role: SlotRole.recovery });
  }
  if (policy) {
    const after = describeRecipients(recipients);
    const question = { operation: 'create', before: undefined, approvedBy: [] } as const;
    requireAllowed(policy, { ...question, after, audited: true });
  }
  return recipients;
}

function requireFitting(format: DiskFormat, flags: MakeFlags): void {
  const keys = (flags.key?.length ?? 0) + (flags.recoveryKey?.length ?? 0);
  if (format === 'sealed' && keys === 0) {
    throw new PqblkError('no_key', 'a sealed disk needs at least one key that may open it', {
      hint: 'name one with --key (`pqblk key gen` makes one), or say --format qcow2 or raw',
    });
  }
  const given: Readonly<Record<string, unknown>> = { ...flags };
  const wrong = Object.keys(ONLY_FOR).find(
    (name) => given[name] !== undefined && !ONLY_FOR[name]?.includes(format),
  );
  if (wrong) {
    const option = wrong.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
    throw new PqblkError('usage', `--${option} means nothing for a ${format} disk`);
  }
}
