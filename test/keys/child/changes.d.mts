import type { KeyAreaEditor, KeyStore } from '../../../src/index.js';

type Edit = (editor: KeyAreaEditor) => Promise<void>;
export function changes(store: KeyStore): Record<string, Edit>;
