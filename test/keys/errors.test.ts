import { inspect } from 'node:util';
import { expect, test } from 'vitest';
import { ERROR_TABLE, exitCodeOf, fromNative, fromSystem, PqblkError } from '../../src/errors.js';

test('codes are unique, and exit codes too but for the two that mean "not this key"', () => {
  const rows = Object.entries(ERROR_TABLE);
  expect(new Set(rows.map(([, row]) => row.code)).size).toBe(rows.length);
  const others = rows.filter(([kind]) => kind !== 'no_slot').map(([, row]) => row.exitCode);
  expect(new Set(others).size).toBe(others.length);
  expect(ERROR_TABLE.no_slot.exitCode).toBe(ERROR_TABLE.wrong_key.exitCode);
  for (const [, { code, exitCode }] of rows) {
    expect(code).toMatch(/^PQBLK_[A-Z_]+$/);
    expect(exitCode).toBeGreaterThan(0);
    expect(exitCode).toBeLessThan(64); // sysexits and signals begin there
  }
});

test('the exit codes that scripts rely on', () => {
  const codes = (
    [
      ['general', 1],
      ['usage', 2],
      ['wrong_key', 3],
      ['token_unavailable', 4],
      ['integrity', 5],
      ['policy', 6],
      ['interrupted', 7],
      ['locked', 8],
      ['no_space', 9],
      ['not_found', 10],
      ['corrupt', 11],
      ['unsupported', 12],
      ['read_only', 13],
      ['io_error', 14],
    ] as const
  ).filter(([kind, code]) => ERROR_TABLE[kind].exitCode !== code);
  expect(codes).toEqual([]);
});

test('every kind of the native engine has a row', () => {
  const native =
    'wrong_key integrity locked no_space io_error corrupt unsupported read_only invalid_argument ' +
    'out_of_range closed not_found exists permission canceled needs_recovery no_random ' +
    'gate_refused policy rollback no_memory';
  for (const kind of native.split(' ')) {
    const error = fromNative({ kind, message: 'm', path: 'p', operation: 'read', offset: 512 });
    expect(error.kind).toBe(kind);
    expect(error).toMatchObject({ path: 'p', operation: 'read', offset: 512 });
    expect(error.toLine()).toBe('p: read at offset 512: m');
  }
  const future = fromNative({ kind: 'melted', message: 'hot' });
  expect(future.code).toBe('PQBLK_ERROR');
  expect(future.message).toContain('melted');
  // Names of Object.prototype are no kinds.
  expect(fromNative({ kind: 'constructor', message: 'm' }).kind).toBe('general');
});

test('system errors keep their cause and get a kind', () => {
  const cause = Object.assign(new Error('ENOSPC: no space left'), { code: 'ENOSPC' });
  const error = fromSystem(cause, { path: '/x', operation: 'write' });
  expect(error.code).toBe('PQBLK_NO_SPACE');
  expect(error.cause).toBe(cause);
  expect(fromSystem(error)).toBe(error);
  expect(fromSystem(Object.assign(new Error('x'), { code: 'EIO' })).kind).toBe('io_error');
  expect(fromSystem(Object.assign(new Error('x'), { code: 'ERR_ODD' })).kind).toBe('general');
  expect(fromSystem('text').message).toBe('text');
  expect(exitCodeOf(error)).toBe(9);
  expect(exitCodeOf(new Error('other'))).toBe(1);
});

test('JSON carries what a program needs and not the cause', () => {
  const error = new PqblkError('locked', 'held by pid 7', {
    path: '/d.qcow2',
    offset: 2n ** 60n,
    hint: 'wait',
    cause: new Error('inner'),
  });
  expect(JSON.parse(JSON.stringify(error))).toEqual({
    code: 'PQBLK_LOCKED',
    exitCode: 8,
    message: 'held by pid 7',
    path: '/d.qcow2',
    offset: '1152921504606846976',
    hint: 'wait',
  });
  expect(inspect(error)).toContain('PQBLK_LOCKED');
});
