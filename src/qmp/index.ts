// Room qmp/: the public face. A running QEMU over its monitor: plugging disks in and out.
//
// It may use errors.ts; it knows no disk, no key and no command line.
export {
  QMP_LINE_BYTES_MAX,
  QmpConnection,
  type QmpConnectOptions,
  QmpError,
  type QmpEvent,
  type QmpVersion,
} from './connection.js';
export {
  checkDeviceId,
  isPlugged,
  type Plugged,
  type PlugOptions,
  plugDisk,
  UNPLUG_TIMEOUT_MS,
  type UnplugOptions,
  unplugDisk,
} from './hotplug.js';
