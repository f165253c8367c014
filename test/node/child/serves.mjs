// Serves a raw disk by NBD and has little patience with clients. argv: DIST DISK SOCKET STALL_SECONDS
const [dist, path, socket, seconds] = process.argv.slice(2);
const { openDisk } = await import(dist);
const disk = await openDisk(path, { format: 'raw' });
await disk.serveNbd({ path: socket, stallSeconds: Number(seconds) });
console.log('ready');
