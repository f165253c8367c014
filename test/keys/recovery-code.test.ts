// The recovery code: what is written can be typed back however it is typed, and what was misread is
// found, and where.
import { expect, test } from 'vitest';
import {
  createKeyArea,
  describeKeyArea,
  encodeRecoveryCode,
  Kem,
  newRecoverySecret,
  openKeyArea,
  parseRecoveryCode,
  RECOVERY_PREFIX,
  recoveryIdentity,
  recoveryRecipient,
  type Secret,
  SlotRole,
  toHex,
} from '../../src/keys/index.js';
import { errorOf, person, secretOf } from './support.js';

const hexOf = (secret: Secret) => secret.use(toHex);
const volumeUuid = new Uint8Array(16).fill(9);

test('every way of typing it gives the same bytes', () => {
  for (let round = 0; round < 50; round += 1) {
    using secret = newRecoverySecret();
    const lines = encodeRecoveryCode(secret);
    expect(lines).toHaveLength(4);
    for (const line of lines)
      expect(line).toMatch(/^([0-9A-HJKMNP-TV-Z]{4} ){3}[0-9A-HJKMNP-TV-Z]{4}$/);
    const text = lines.join('\n');
    for (const typed of [
      text,
      text.toLowerCase(),
      text.replaceAll(/\s/g, ''),
      text.replaceAll(' ', '-'),
      text.replaceAll(' ', ' – '),
      text.replaceAll('0', 'O').replaceAll('1', 'l'),
      text.replaceAll('1', 'I'),
      lines.map((line, index) => `${index + 1}. ${line}\r`).join('\n'),
      RECOVERY_PREFIX + text.replaceAll(/\s/g, ''),
    ]) {
      using back = parseRecoveryCode(secretOf(typed));
      expect(hexOf(back)).toBe(hexOf(secret));
    }
  }
});

test('a misread character, and lines in another order, are found and named', async () => {
  using secret = newRecoverySecret();
  const code = encodeRecoveryCode(secret).join('').replaceAll(' ', '');
  const messageOf = async (text: string) => {
    const error = await errorOf(() => parseRecoveryCode(secretOf(text)));
    expect(error.kind).toBe('bad_key');
    return error.message;
  };
  for (let at = 0; at < 64; at += 1) {
    const other = code[at] === '7' ? '8' : '7';
    const misread = code.slice(0, at) + other + code.slice(at + 1);
    expect(await messageOf(misread)).toContain(`line ${Math.floor(at / 16) + 1} `);
    if (at % 16 < 15 && code[at] !== code[at + 1]) {
      const swapped =
        code.slice(0, at) + (code[at + 1] ?? '') + (code[at] ?? '') + code.slice(at + 2);
      expect(await messageOf(swapped)).toContain(`line ${Math.floor(at / 16) + 1} `);
    }
  }
  const lines = code.match(/.{16}/g) ?? [];
  expect(await messageOf([...lines].reverse().join(''))).toContain('line 1 ');
  expect(await messageOf(code.slice(1))).toContain('64 characters, not 63');
  expect(await messageOf(`${code}0`)).toContain('not 65');
  expect(await messageOf(`${code.slice(1)}U`)).toContain('"U"');
  expect(await messageOf(' ')).toContain('not 0');
});

test.each(Object.values(Kem))(
  'opens a disk through a slot of KEM %i, and no other',
  async (kem) => {
    using secret = newRecoverySecret();
    using other = newRecoverySecret();
    const alice = await person('alice');
    const recipient = { ...(await recoveryRecipient(secret, kem, 'kit')), role: SlotRole.recovery };
    const area = await createKeyArea({ volumeUuid, recipients: [alice.recipient, recipient] });
    const { slots } = describeKeyArea(area.blob);
    using typed = parseRecoveryCode(secretOf(encodeRecoveryCode(secret).join(' ')));
    using identity = await recoveryIdentity(typed, slots);
    using opened = await openKeyArea(area.blob, identity);
    expect(opened.slot).toMatchObject({ label: 'kit', role: 'recovery' });
    expect((await errorOf(() => recoveryIdentity(other, slots))).kind).toBe('no_slot');
  },
);
