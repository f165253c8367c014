// Room disk/: the public face. Other rooms import from here only.
//
// Open disks, their queues, making, describing, checking and copying them. It may use native.ts, the
// room keys/ and errors.ts; it knows no command line.
export type { LongWork, Progress } from '../native.js';
export { ControlClient } from './control-client.js';
export { explainLocked } from './control-place.js';
export { type ControlServer, serveControl } from './control-server.js';
export {
  type CopyOptions,
  type CopyResult,
  copyDisk,
  copyToNewDisk,
  type ExportOptions,
  exportFile,
  type ImportOptions,
  importFile,
} from './copy.js';
export {
  type CreateDiskOptions,
  type CreatedDisk,
  createDisk,
  freeSpace,
  inSystemDirectory,
  type Preallocation,
} from './create.js';
export { createAndOpenDisk, Disk, openDisk, type WriteOptions, type ZeroOptions } from './disk.js';
export { handKeys, type KeyAgentOptions, serveKeys } from './hand-keys.js';
export {
  backUpHeader,
  encodeHeaderBackup,
  type HeaderBackup,
  parseHeaderBackup,
  readHeaderBackup,
  writeHeaderBackup,
} from './header-backup.js';
export {
  isOutdated,
  isPinsWord,
  type RestoredHeader,
  type RestoredSlots,
  type RestoreHeaderOptions,
  restoreHeader,
} from './header-restore.js';
export {
  type CheckDiskOptions,
  type CheckResult,
  checkDisk,
  type DiskInfo,
  diskInfo,
  type EngineInfo,
  engineInfo,
  type Qcow2Info,
  type SealedInfo,
} from './info.js';
export { keyAreaOf, readKeyArea } from './key-area-file.js';
export {
  keysAreLocked,
  noCoreDumps,
  noCoreFiles,
  noNewPrivileges,
  notifyServiceManager,
  refuseSystemCalls,
} from './process.js';
export { type CompletionHandler, DiskQueue, type DiskQueueOptions } from './queue.js';
export {
  planDataKeyRotation,
  type RekeyOptions,
  type RekeyPass,
  ROTATION_STEPS,
  type RotateDataKeyOptions,
  type RotatedDataKey,
  type RotationHost,
  type RotationStep,
  rotateDataKey,
} from './rotate.js';
export {
  type NbdOptions,
  NbdServer,
  type NbdStats,
  type NbdTls,
} from './serve.js';
export { type VhostUserOptions, VhostUserServer, type VhostUserStats } from './serve-vhost-user.js';
export type {
  BackendStats,
  BenchDirection,
  BenchPattern,
  BenchResult,
  BenchSpec,
  CacheMode,
  DiskExtent,
  DiskFacts,
  DiskFormat,
  DiskStats,
  EngineName,
  ExtentKind,
  KeyOptions,
  LatencyStats,
  OpenDiskOptions,
  QueueStats,
  RateLimits,
  RequestKind,
} from './types.js';
export { latencyBucketSeconds } from './types.js';
export { openCopies } from './unlock.js';
