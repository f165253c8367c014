// A disk's life up to a named step, in a child process or a worker; what then ends it is the test's
// business. argv (or workerData): dist/index.js, the disk's path, the step.
import { connect } from 'node:net';
import { isMainThread, parentPort, workerData } from 'node:worker_threads';

const [dist, path, step, end] = isMainThread ? process.argv.slice(2) : workerData;
const { openDisk } = await import(dist);

const never = new Promise(() => {});
let disk;

async function open() {
  disk = await openDisk(path, { format: 'raw', queues: 2 });
}

function inFlight(kind, count = 64) {
  for (let i = 0; i < count; i++) {
    disk[kind](Buffer.alloc(64 * 1024, i), i * 64 * 1024).catch(() => {});
  }
}

async function serving() {
  await open();
  await disk.serveNbd({ path: `${path}.nbd` });
  await disk.serveVhostUser({ path: `${path}.vhost` });
}

const steps = {
  loaded: async () => {},
  opening: async () => {
    openDisk(path, { format: 'raw' }).catch(() => {});
  },
  open,
  reading: async () => {
    await open();
    inFlight('read');
  },
  writing: async () => {
    await open();
    inFlight('write');
  },
  // Requests are on their way to the queue when the process ends, completions on their way back.
  busy: async () => {
    await open();
    const worker = async () => {
      const buffer = Buffer.alloc(4096);
      for (;;) await disk.read(buffer, 0);
    };
    for (let i = 0; i < 32; i++) worker().catch(() => {});
    await new Promise((resolve) => setTimeout(resolve, 30));
  },
  batched: async () => {
    await open();
    const queue = disk.queue(64);
    for (let i = 0; i < 64; i++) queue.write(i * 4096, 4096, i * 4096, i);
    queue.submit();
  },
  bench: async () => {
    await open();
    disk.bench({ rw: 'randread', runtimeMs: 60_000 }).catch(() => {});
    await new Promise((resolve) => setTimeout(resolve, 30));
  },
  serving,
  // The disk's end is its servers' end too.
  served: async () => {
    await serving();
    await disk.close();
  },
  // The environment's thread is inside of a report when the worker ends, and the next one waits.
  reporting: async () => {
    await open();
    const onReport = () => {
      parentPort.postMessage('there');
      for (;;);
    };
    const sockets = [`${path}.nbd`, `${path}.vhost`];
    for (const socket of sockets) await disk.serveVhostUser({ path: socket, onReport });
    // A second front-end is turned away, with a report.
    for (const socket of [...sockets, ...sockets]) connect(socket);
    // Both servers have reported before this thread looks.
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 200);
    await never;
  },
  resizing: async () => {
    await open();
    disk.resize(disk.size * 2).catch(() => {});
  },
  closing: async () => {
    await open();
    inFlight('write');
    disk.close().catch(() => {});
  },
  closed: async () => {
    await open();
    await disk.close();
  },
};

await steps[step]();
if (end === 'exit') process.exit(7);
if (end === 'throw') throw new Error('thrown on purpose');
if (end === 'idle') {
  // Nothing is awaited: the event loop must end by itself once nothing is in flight.
} else {
  parentPort?.postMessage('there');
  const timer = setInterval(() => {}, 1000);
  await never;
  clearInterval(timer);
}
