// Somebody else on this host: gives up root, and then
//
//   node other-user.mjs DIST DISK listen   listens under a name of the disk; says `listening`
//   node other-user.mjs DIST DISK ask      asks whoever serves the disk for its size; prints the error code
import { statSync } from 'node:fs';
import { dirname, join } from 'node:path';

const NOBODY = 65534;
const [dist, path, what] = process.argv.slice(2);
const { ControlClient } = await import(dist);
const { native } = await import(join(dirname(dist), 'native.js'));
native(); // loaded as long as its directory may be read
process.setgid(NOBODY);
process.setuid(NOBODY);

if (what === 'listen') {
  const { dev, ino } = statSync(path, { bigint: true });
  const fd = native().listenLocal(`pqblk/control/${dev}-${ino}/0000000000000000`);
  if (fd < 0) throw new Error(`errno ${-fd}`);
  process.stdout.write('listening\n');
  process.stdin.resume(); // until the test ends it
} else {
  const client = await ControlClient.open(path);
  const answer = await client.size().catch(({ code, hint }) => ({ code, hint }));
  process.stdout.write(JSON.stringify(answer));
  client.close();
}
