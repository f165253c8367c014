// Sizes as people write them. The oracle: numbers written out by hand.
import { describe, expect, it } from 'vitest';
import { formatSize, parseNewSize, parseSize } from '../../src/cli/sizes.js';
import { PqblkError } from '../../src/errors.js';

describe('parseSize', () => {
  it.each([
    ['0', 0],
    ['4096', 4096],
    ['4096B', 4096],
    ['4k', 4096],
    ['4 KiB', 4096],
    ['512M', 536870912],
    ['512MB', 536870912],
    ['20G', 21474836480],
    ['1T', 1099511627776],
    ['1.5G', 1610612736],
    ['8191T', 9006099743113216],
  ])('%s is %d bytes', (text, bytes) => {
    expect(parseSize(text)).toBe(bytes);
  });

  it.each(['', 'G', '-1', '1X', '0x10', '1e3', '20 GG', '1,5G', '1.3K', '8192T', '1E', 'NaN'])(
    'refuses %j with kind usage',
    (text) => {
      expect(() => parseSize(text)).toThrow(PqblkError);
      expect(() => parseSize(text)).toThrow(expect.objectContaining({ kind: 'usage' }));
    },
  );
});

it('reads +SIZE as relative to the current size', () => {
  expect(parseNewSize('+1G', 1024)).toBe(1073742848);
  expect(parseNewSize('1G', 1024)).toBe(1073741824);
});

it.each([
  [0, '0 B'],
  [1023, '1023 B'],
  [1024, '1 KiB'],
  [1536, '1.5 KiB'],
  [536870912, '512 MiB'],
  [21474836480, '20 GiB'],
  [1234567890, '1.15 GiB'],
  [12345678901, '11.5 GiB'],
  [123456789012, '115 GiB'],
])('shows %d as %s', (bytes, text) => {
  expect(formatSize(bytes)).toBe(text);
});
