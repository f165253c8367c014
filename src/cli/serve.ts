// Room cli/: `pqblk serve`: a disk for hypervisors and other programs, until a signal ends it.
import { type Command, InvalidArgumentError, Option } from 'commander';
import { PqblkError } from '../errors.js';
import { addEngineOptions, addOpenOptions, keyOption } from './opening.js';
import { examples, jsonOption, parsePositiveCount, positiveSizeArgument } from './options.js';
import { parseAddress, readServeConfig } from './serve-config.js';
import { type DiskPlan, type ServePlan, serveAll, type TcpAddress } from './serving.js';
import type { Terminal } from './terminal.js';

interface Flags extends Omit<DiskPlan, 'path' | 'name'> {
  stats?: string;
  json?: boolean;
  config?: string;
  sandbox?: boolean;
}

export function addServe(program: Command, terminal: Terminal): void {
  const command = program
    .command('serve [disk]')
    .description('Serve disks to hypervisors and other programs, until SIGINT or SIGTERM.')
    .option('--config <file>', 'serve the disks that a YAML file names (docs/serve.md)')
    .addOption(
      new Option(
        '--vhost-user <socket>',
        'virtio-blk for QEMU and others, a ring for each of --queues; fd:N: an inherited socket',
      ),
    )
    .option('--nbd <socket>', 'NBD on a Unix socket, mode 0600')
    .addOption(
      new Option('--nbd-tcp <host:port>', 'NBD over TCP; needs TLS or --insecure').argParser(
        tcpAddress,
      ),
    )
    .option('--tls-psk <file>', 'TLS with pre-shared keys, lines name:hex as psktool writes them')
    .option(
      '--tls-cert <dir>',
      'TLS with server-cert.pem, server-key.pem, ca-cert.pem (of clients)',
    )
    .option(
      '--insecure',
      'allow TCP in plain text, TLS without ca-cert.pem: whoever reaches the port has the disk',
    )
    .option('--export-name <name>', 'name of the NBD export; the empty one works in any case')
    .addOption(new Option('--max-clients <n>', 'NBD clients at once').argParser(parsePositiveCount))
    .addOption(
      new Option(
        '--idle-timeout <seconds>',
        'disconnect NBD clients that ask for nothing (default: never)',
      ).argParser(parsePositiveCount),
    )
    .option('--read-only', 'refuse to change the disk')
    .addOption(
      new Option(
        '--iops-max <n>',
        'requests a second, flushes not counted, of all queues and clients together',
      ).argParser(parsePositiveCount),
    )
    .addOption(
      new Option(
        '--iops-burst <n>',
        'requests that may go at once after a rest (default: a tenth of --iops-max)',
      ).argParser(parsePositiveCount),
    )
    .addOption(
      new Option('--bps-max <size>', 'bytes a second of reads and writes').argParser(
        positiveSizeArgument,
      ),
    )
    .addOption(
      new Option(
        '--bps-burst <size>',
        'bytes that may go at once after a rest (default: a tenth of --bps-max)',
      ).argParser(positiveSizeArgument),
    )
    .option('--no-sandbox', 'for debuggers: no system call filter, core dumps as the system allows')
    .option('--stats <socket>', 'HTTP on a Unix socket: /metrics for Prometheus, /stats as JSON')
    .addOption(keyOption());
  addOpenOptions(addEngineOptions(command))
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples(
        'pqblk serve vm.sealed --key alice --vhost-user /run/vm.sock --queues 4',
        'pqblk serve vm.sealed --key alice --nbd /run/vm-nbd.sock --iops-max 2000 --bps-max 200M',
        'pqblk serve --config /etc/pqblk/serve.yaml',
        'pqblk serve vm.sealed --key alice --nbd-tcp 0.0.0.0:10809 --tls-psk keys.psk --queues 4',
      ),
    )
    .action(async (path: string | undefined, flags: Flags, self: Command) => {
      const others = self.options.filter(
        (option) =>
          !['config', 'stats', 'json', 'sandbox'].includes(option.attributeName()) &&
          self.getOptionValueSource(option.attributeName()) === 'cli',
      );
      const given = others.map((option) => String(option.long));
      await serveAll(terminal, await planOf(path, flags, given));
    });
}

function tcpAddress(text: string): TcpAddress {
  const found = parseAddress(text);
  if (!found) throw new InvalidArgumentError('expected HOST:PORT.');
  return found;
}

/** With a file, an option of a disk would say something that the file says too, or does not reach. */
async function planOf(
  path: string | undefined,
  { stats, json, config, sandbox, ...flags }: Flags,
  given: readonly string[],
): Promise<ServePlan> {
  if (config === undefined) {
    if (path !== undefined) return { disks: [{ ...flags, path }], stats, json, sandbox };
    throw new PqblkError('usage', 'no disk was named', { hint: 'name one, or --config FILE' });
  }
  const twice = path === undefined ? given : ['a disk', ...given];
  if (twice.length > 0) {
    throw new PqblkError('usage', `${twice[0]} besides --config`, {
      hint: 'the file says what is served; only --stats, --json and --no-sandbox go with it',
    });
  }
  const plan = await readServeConfig(config);
  return { ...plan, stats: stats ?? plan.stats, json, sandbox };
}
