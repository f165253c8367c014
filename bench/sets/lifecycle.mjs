// The set `lifecycle`: what happens to a disk between its I/O. It is opened, unlocked, imported,
// checked, and its keys change.
import { keys } from '../lib/lifecycle/keys.mjs';
import { moving } from '../lib/lifecycle/moving.mjs';
import { opening } from '../lib/lifecycle/opening.mjs';

export default {
  name: 'lifecycle',
  about: 'open, unlock, import, check, rekey: whole commands and calls of the API',
  async run(bench) {
    if (!bench.quick) await opening(bench);
    await keys(bench);
    await moving(bench);
  },
};
