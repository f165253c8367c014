// Changes the key area of a disk and kills itself (SIGKILL) right after one step.
//
//   node change.mjs DISK STORE PINS AUDIT OPERATION STEP
//
// It runs the built package, as a user's process would.
import { AuditLog, changeKeyArea, KeyStore, keyAreaOf } from '../../../dist/index.js';
import { Pins } from '../../../dist/keys/pins.js';
import { changes } from './changes.mjs';

const [path, directory, pins, audit, operation, last] = process.argv.slice(2);
const store = new KeyStore(directory);
const identity = await store.unlock('alice');
const { keys } = await store.list();
await changeKeyArea({
  place: keyAreaOf(path),
  identity,
  operation,
  pins: new Pins(pins),
  audit: new AuditLog(audit),
  trusted: new Set(keys.map((key) => key.fingerprint)),
  edit: await changes(store)[operation],
  onStep: (step) => {
    if (step === last) process.kill(process.pid, 'SIGKILL');
  },
});
