// Room keys/: the public face. Other rooms import from here only.
//
// The room turns private keys and passphrases into the keys of a volume, and gives the key area its
// meaning. It may use errors.ts and the cryptographic packages; it knows no image, no engine and no
// command line. Everything secret leaves it as a Secret, which the receiver wipes.

export {
  AuditLog,
  type AuditRecord,
  type AuditReport,
  type AuditStanding,
  readAuditLog,
  verifyAuditLog,
} from './audit-log.js';
export { formatUuid, parseUuid, toHex } from './bytes.js';
export { chooseKey } from './choose.js';
export { readInput, readInputText } from './input-file.js';
export {
  type CreatedKeyArea,
  type CreateKeyAreaOptions,
  createKeyArea,
  type OpenedKeyArea,
  type OpenKeyAreaOptions,
  openKeyArea,
  type VolumeKeys,
} from './key-area.js';
export {
  type AuditLine,
  type AuditRemarks,
  type AuditSubject,
  type AuditTrail,
  CHANGE_STEPS,
  type ChangedKeyArea,
  type ChangeKeyAreaOptions,
  type ChangeStep,
  changeKeyArea,
  type KeyAreaState,
  requireApprover,
} from './key-area-change.js';
export { generationIn, KEY_AREA_BYTES, SLOTS_MAX } from './key-area-codec.js';
export {
  type Chosen,
  type CopyIndex,
  findingsOf,
  isContested,
  isPlainlyFalse,
  type KeyAreaCopies,
  type KeyAreaCopy,
  type KeyAreaPlace,
  mendCopies,
  needsMending,
  openNewest,
  orderCopies,
  type PinFollower,
  type Refusal,
  requireReadable,
  requireUncontested,
  sisterOf,
} from './key-area-copies.js';
export {
  type AuditHead,
  describeKeyArea,
  describeRecipients,
  type KeyAreaDescription,
  type SlotDescription,
} from './key-area-describe.js';
export { addSlot, KeyAreaEditor, type RewrapOptions } from './key-area-editor.js';
export { SCRYPT_COST, type ScryptCost, type TokenPart } from './key-file.js';
export { liboqs, prepareKeys, softwareIdentity } from './liboqs.js';
export { takeLock } from './lock-file.js';
export {
  DEFAULT_KEM,
  fingerprintOf,
  Kem,
  type KemId,
  kemByName,
  kemParameters,
} from './ml-kem.js';
export {
  type AskedFor,
  PASSPHRASE_BYTES_MAX,
  type PassphraseSource,
  readPassphrase,
} from './passphrase.js';
export {
  fromState,
  type Observed,
  type Pin,
  type PinnedState,
  type PinOptions,
  Pins,
  type PinVerdict,
  toState,
  type VolumePin,
} from './pins.js';
export type { ModulePlace } from './pkcs11/place.js';
export { kemsOf, loadProfile, PROFILES, type Profile, parseProfile } from './pkcs11/profile.js';
export { openTokenKey, proveKey, TokenProvider, uriOf } from './pkcs11/provider.js';
export { type ModuleInfo, nameOf, type TokenInfo } from './pkcs11/replies.js';
export { type TokenEntry, type TokenKey, TokenModule } from './pkcs11/token.js';
export { formatTokenUri, parseTokenUri, type TokenUri } from './pkcs11/uri.js';
export {
  type KeyOperation,
  OPERATIONS,
  type Policy,
  parsePolicy,
  requireAllowed,
  requireOpenable,
  type Violation,
  violations,
} from './policy.js';
export {
  type Encapsulation,
  type Identity,
  type KemProvider,
  type KeyPair,
  type PrivateKey,
  type ProviderDescription,
  ProviderKind,
} from './provider.js';
export { parseRecipient } from './recipient-file.js';
export {
  encodeRecoveryCode,
  newRecoverySecret,
  parseRecoveryCode,
  RECOVERY_PREFIX,
  recoveryIdentity,
  recoveryRecipient,
} from './recovery-code.js';
export { Secret, unmovedCopy } from './secret.js';
export { type Recipient, SlotRole, SlotState } from './slot.js';
export {
  type BringPassphrase,
  defaultStorePath,
  type KeyInfo,
  type KeyListing,
  KeyStore,
  type Protection,
} from './store.js';
export { isWaitingForInput, waitingFor } from './waiting.js';
