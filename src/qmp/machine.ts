// Room qmp/: what a running machine says of itself, as far as plugging in a disk needs it: its
// devices, its memory, its free PCI Express ports, its connections to servers.
//
// Answers are checked here before anybody uses them.
import { PqblkError } from '../errors.js';
import { cleaned, type QmpConnection, QmpError, recordOf } from './connection.js';

/** Where `-device` and device_add put devices that have an id. */
const DEVICES = '/machine/peripheral';
const PORTS: ReadonlySet<string> = new Set([
  ...['pcie-root-port', 'ioh3420', 'xio3130-downstream'],
]);

export const devicePath = (id: string) => `${DEVICES}/${id}`;

function unexpected(qmp: QmpConnection, operation: string, found: unknown): PqblkError {
  const text = `expected another answer, found ${cleaned(found)}`;
  return new PqblkError('hypervisor', text, { path: qmp.path, operation });
}

async function list(
  qmp: QmpConnection,
  command: string,
  args: Readonly<Record<string, unknown>> = {},
): Promise<Readonly<Record<string, unknown>>[]> {
  const answer = await qmp.execute(command, args);
  if (!Array.isArray(answer)) throw unexpected(qmp, command, answer);
  return answer.map((item) => {
    const record = recordOf(item);
    if (record === undefined) throw unexpected(qmp, command, answer);
    return record;
  });
}

/** The children of an object of the machine: name → type. */
async function childrenOf(qmp: QmpConnection, path: string): Promise<Map<string, string>> {
  const properties = await list(qmp, 'qom-list', { path });
  return new Map(properties.map(({ name, type }) => [String(name), childType(String(type))]));
}

function childType(type: string): string {
  return /^child<(.*)>$/.exec(type)?.[1] ?? '';
}

/** A property that is text; undefined when the object or the property is not there. */
export async function textProperty(
  qmp: QmpConnection,
  path: string,
  property: string,
): Promise<string | undefined> {
  try {
    const value = await qmp.execute('qom-get', { path, property });
    return typeof value === 'string' ? value : undefined;
  } catch (error) {
    if (error instanceof QmpError) return undefined;
    throw error;
  }
}

/** The type of the device `id`; undefined when there is none. */
export async function deviceType(qmp: QmpConnection, id: string): Promise<string | undefined> {
  return (await childrenOf(qmp, DEVICES)).get(id) || undefined;
}

/** Where the character device `id` leads, or undefined when there is none. */
export async function chardevPlace(
  qmp: QmpConnection,
  id: string,
): Promise<{ place: string; connected: boolean } | undefined> {
  const found = (await list(qmp, 'query-chardev')).find(({ label }) => label === id);
  if (!found) return undefined;
  const place = String(found.filename);
  return { place, connected: !place.startsWith('disconnected:') };
}

/**
 * Throws unless another process can see all of the guest's memory: QEMU does not notice, and the
 * server would answer into pages that the guest never reads. Kind `unsupported`.
 */
export async function checkMemoryIsShared(qmp: QmpConnection): Promise<void> {
  const backends = await list(qmp, 'query-memdev');
  const wanted = await memoryInUse(qmp);
  for (const { id, share } of backends) {
    const name = String(id);
    if (wanted !== undefined && !wanted.has(name)) continue;
    const type = await textProperty(qmp, `/objects/${name}`, 'type');
    const anonymous = type === 'memory-backend-ram' && !qmp.atLeast(10);
    if (share === true && !anonymous) continue;
    const hint =
      'start QEMU with `-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram`';
    const why = share === true ? 'has no descriptor to share' : 'is private to QEMU';
    const text = `the guest's memory “${cleaned(name)}” ${why}; a vhost-user server has to see it`;
    throw new PqblkError('unsupported', text, { path: qmp.path, operation: 'attach', hint });
  }
}

/** Names of the memory backends that are guest memory; undefined (NUMA): all that there are. */
async function memoryInUse(qmp: QmpConnection): Promise<Set<string> | undefined> {
  const main = await textProperty(qmp, '/machine', 'memory-backend');
  if (!main) return undefined;
  const modules = await list(qmp, 'query-memory-devices');
  const paths = [main, ...modules.map(({ data }) => recordOf(data)?.memdev)];
  return new Set(paths.map((path) => String(path).replace(/^.*\//, '')));
}

/** PCI Express ports with an id that take another device, by name; none on older machine types. */
export async function freePorts(qmp: QmpConnection): Promise<{ free: string[]; all: string[] }> {
  const devices = await childrenOf(qmp, DEVICES);
  const all = [...devices].filter(([, type]) => PORTS.has(type)).map(([id]) => id);
  const free: string[] = [];
  for (const id of all) {
    const bus = await childrenOf(qmp, `${devicePath(id)}/${id}`);
    if (![...bus.keys()].some((name) => name.startsWith('child['))) free.push(id);
  }
  return { free, all };
}
