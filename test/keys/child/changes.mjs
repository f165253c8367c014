// The changes that change.mjs and its test know, each as the `edit` of changeKeyArea. All of them may
// be run again after they were cut short.

/** `store` holds alice, bob and carol. The disk is sealed to alice (slot 0) and bob (slot 1). */
export function changes(store) {
  return {
    async 'slot-revoke'(editor) {
      editor.revoke(1);
    },
    async rewrap(editor) {
      const recipient = await store.recipient('carol');
      const { fingerprint } = await store.show('carol');
      if (editor.slots[1].fingerprint !== fingerprint) editor.rewrap(1, { recipient });
    },
    async 'rotate-master-key'(editor) {
      editor.rotateMasterKey();
    },
  };
}
