// pqblk: the public API of the package.
//
//   import { createDisk, KeyStore, openDisk } from 'pqblk';
//
// Everything that is exported here is documented where it is declared; errors are PqblkErrors with a
// stable `.code`.
export * from './disk/index.js';
export {
  ERROR_TABLE,
  type ErrorCode,
  type ErrorDetails,
  type ErrorKind,
  exitCodeOf,
  PqblkError,
} from './errors.js';
export * from './keys/index.js';
export * from './qmp/index.js';
