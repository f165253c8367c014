// What happens to a disk under load. Each event says when it is possible, how often it comes, and ends
// with everything as it was, but for the disk's size and keys. One that did not come off resolves to
// false, and is not counted.
import { setTimeout as sleep } from 'node:timers/promises';
import { GUEST_KEY } from './keys.mjs';
import { killChild, pqblk, Wrong } from './processes.mjs';

const MiB = 2 ** 20;
// `pqblk exit-codes`
const TOKEN_CRASHED = 42;
const SLOT_REVOKED = 17;
const served = (_, kind) => kind !== 'c';
const hosted = (_, kind) => kind === 'host';
const keyed = (episode, kind) => episode.sealed && kind !== 'c';
const small = ({ place }) => place.stall !== undefined;

const event = (name, weight, when, act) => ({ name, weight, when, run: act });

export const EVENTS = [
  event('server stopped a while', 3, served, async ({ server, random }) => {
    server.kill('SIGSTOP');
    await sleep(random.between(50, 2500));
    server.kill('SIGCONT');
  }),

  event(
    'client stopped a while',
    3,
    () => true,
    async ({ running, random }) => {
      const client = random.of(...running);
      if (!client) return false;
      client.kill('SIGSTOP');
      await sleep(random.between(50, 2500));
      client.kill('SIGCONT');
      return true;
    },
  ),

  event('device stands still', 4, small, async ({ place, random, soak }) => {
    const problem = await place.stall(random.between(100, 3000));
    if (!problem) return true;
    soak.skip(`the device did not stand still: ${problem}`);
    return false;
  }),

  event(
    'file system full',
    4,
    (episode) => small(episode) && !episode.crowded,
    async (episode) => {
      const { place, random } = episode;
      await episode.tolerate();
      place.fill(random.below(4) * MiB);
      await sleep(random.between(500, 4000));
      await episode.makeRoom();
    },
  ),

  // Its requests may still come through; its slots rest until everything was looked at.
  event('client killed', 1, served, async ({ running, random, steady }) => {
    const client = random.of(...running);
    if (!client || steady) return false;
    client.kill();
    await client.ended;
    client.state = 'gone';
    return true;
  }),

  event('limits', 2, hosted, async ({ server, random }) => {
    const tight = { iopsMax: 200 + random.below(2000), bpsMax: (1 + random.below(64)) * MiB };
    await ask(server, `limits ${JSON.stringify(tight)}`, 'limited');
    await sleep(random.between(100, 1000));
    await ask(server, 'limits {}', 'limited');
  }),

  event('resize', 2, hosted, async (episode) => {
    const bytes = episode.shape.size + (1 + episode.random.below(8)) * 2 * MiB;
    if (bytes > episode.shape.maxSize || episode.crowded) return false; // its tables may find no room
    await ask(episode.server, `resize ${bytes}`, 'resized');
    episode.grown(bytes);
    return true;
  }),

  event('whole disk read by nbdcopy', 1, served, (episode) => episode.nbdcopy('nbd', 'null:')),

  event('whole disk read by nbdcopy with TLS', 1, hosted, (episode) =>
    episode.nbdcopy('tls', 'null:'),
  ),

  event('header backed up', 1, keyed, async (episode) => {
    const file = episode.at(`header-${episode.counts.events['header backed up'] ?? 0}`);
    await episode.must(['header', 'backup', episode.disk, file]);
  }),

  // The data path, which the clients look at, has nothing to do with a token.
  event('token process killed', 1, keyed, async (episode) => {
    if (episode.changing) return false;
    const words = ['rewrap', episode.disk, '--key', 'vault'];
    let killed = false;
    const first = await pqblk(words, episode.soak.env, (command) => {
      const look = setInterval(() => {
        killed ||= killChild(command.pid, 'pqblk-pkcs11');
        if (killed || command.exitCode !== null) clearInterval(look);
      }, 2);
    });
    const allowed = killed ? [0, TOKEN_CRASHED] : [0];
    if (!allowed.includes(first.code)) {
      throw new Wrong(
        `pqblk rewrap, its token process killed: exit ${first.code}: ${first.stderr}`,
      );
    }
    await episode.must(words);
    return true;
  }),

  event('slot added and revoked', 1, keyed, async (episode) => {
    if (episode.changing) return false;
    const { disk, random } = episode;
    const slot = (word, ...more) => episode.must(['slot', word, disk, ...more]);
    await slot('add', GUEST_KEY, '--key', 'alice');
    await slot('test', '--key', GUEST_KEY);
    if (random.chance(0.5)) await slot('retire', GUEST_KEY, '--key', 'alice');
    await slot('revoke', GUEST_KEY, '--key', 'alice');
    await episode.must(['slot', 'test', disk, '--key', GUEST_KEY], [SLOT_REVOKED]);
    return true;
  }),

  ...[
    ['data key rotated', 3, (random) => ['rotate-data-key', '--share', random.of('20', '60')]],
    ['master key rotated', 2, () => ['rotate-master-key']],
    ['slot rewrapped', 2, () => ['rewrap']],
  ].map(([name, weight, words]) =>
    event(name, weight, keyed, async (episode) => {
      if (episode.changing) return false;
      episode.changeKeys(words(episode.random));
      return true;
    }),
  ),
];

async function ask(server, order, answer) {
  const said = await server.told(order, answer, 'refused', 'ended');
  if (said.event !== answer) throw new Wrong(`${order}: ${JSON.stringify(said)}`);
}
