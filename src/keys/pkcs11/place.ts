// Room keys/pkcs11: where a module lies, and what has to be there before it is loaded.
import { accessSync } from 'node:fs';
import { isAbsolute } from 'node:path';
import { fromSystem, PqblkError } from '../../errors.js';
import type { Profile } from './profile.js';

/** What has to be known to load a module. */
export interface ModulePlace {
  /** Absolute path. */
  readonly module: string;
  readonly profile: Profile;
  /** Where the token keeps its files, for profiles whose configuration asks for it. */
  readonly directory?: string | undefined;
}

/** Kind `token_mistrusted`: the token does something else than ML-KEM, or less safely. */
export function mistrust(what: string, place: ModulePlace): PqblkError {
  return new PqblkError('token_mistrusted', `the token ${what}`, {
    path: place.module,
    hint: `does the profile "${place.profile.name}" fit the token?`,
  });
}

/** Before a process is started for it. */
export function requireFile(path: string): void {
  if (!isAbsolute(path)) {
    throw new PqblkError('invalid_argument', 'the module is named by its absolute path', { path });
  }
  requireThere(path, 'load token module');
}

function requireThere(path: string, operation: string): void {
  try {
    accessSync(path);
  } catch (error) {
    throw fromSystem(error, { path, operation });
  }
}

/** What C_Initialize is told, if anything. */
export function configurationFor({ profile, directory }: ModulePlace): string | undefined {
  const { configuration } = profile;
  if (configuration === undefined || !configuration.includes('{directory}')) return configuration;
  if (directory === undefined) {
    throw new PqblkError('usage', `the profile "${profile.name}" needs the token's directory`, {
      hint: 'name it with --token-dir, or x-pqblk-directory in the URI',
    });
  }
  // The parameter is a quoted string that knows escapes; such a name could add parameters to it.
  if (!isAbsolute(directory) || /['"\\\p{Cc}]/u.test(directory)) {
    throw new PqblkError('invalid_argument', 'an absolute path without quotes is needed', {
      path: directory,
    });
  }
  requireThere(directory, "open the token's directory");
  return configuration.replaceAll('{directory}', directory);
}
