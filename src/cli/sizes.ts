// Room cli/: sizes as people write and read them. The only parser of sizes in the project.
//
// Powers of 1024 throughout (`20G` is 20 GiB), as qemu-img and fio read them. Knows nothing of disks.
import { PqblkError } from '../errors.js';

const UNITS = 'KMGTPE';
const PATTERN = /^(\d+(?:\.\d+)?)\s*(?:([KMGTPE])(?:i?B)?|B)?$/i;

/**
 * Bytes of `20G`, `512M`, `1.5TiB`, `4096` or `0`. Kind `usage` for anything else, for a fraction of
 * a byte, and beyond 2^53 - 1 (8 PiB), from where a JavaScript number is no longer exact.
 */
export function parseSize(text: string): number {
  const found = PATTERN.exec(text.trim());
  if (!found) {
    throw new PqblkError('usage', `'${text}' is not a size`, {
      hint: 'sizes read 4096, 512M, 20G or 1T; units are powers of 1024',
    });
  }
  const exponent = found[2] ? UNITS.indexOf(found[2].toUpperCase()) + 1 : 0;
  const bytes = Number(found[1]) * 1024 ** exponent;
  if (!Number.isInteger(bytes) || bytes > Number.MAX_SAFE_INTEGER) {
    const problem = Number.isInteger(bytes) ? 'is too large' : 'is not a whole number of bytes';
    throw new PqblkError('usage', `size '${text}' ${problem}`);
  }
  return bytes;
}

/** `SIZE` or `+SIZE`; the second is relative to `current`. Bytes. */
export function parseNewSize(text: string, current: number): number {
  return text.startsWith('+') ? current + parseSize(text.slice(1)) : parseSize(text);
}

/** Bytes for people: at most four digits and a unit (`512 MiB`, `1.5 GiB`, `17 B`). */
export function formatSize(bytes: number): string {
  let value = bytes;
  let unit = -1;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  if (unit < 0) return `${bytes} B`;
  const digits = Number.isInteger(value) || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${Number(value.toFixed(digits))} ${UNITS[unit]}iB`;
}

/** What there is to say where a header is of before the disk was grown, to so many bytes; 0: nothing. */
export const grownWarning = (grownTo: number): string[] =>
  grownTo === 0
    ? []
    : [
        'the disk was grown after the backup of its header was made, and has data beyond the size in it: ' +
          `\`pqblk resize DISK ${grownTo}\` brings it back, and before that it takes no writes`,
      ];
