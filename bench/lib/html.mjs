// Text as it stands in HTML.
const ESCAPES = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' };

export const escaped = (text) => `${text}`.replace(/[&<>"]/g, (character) => ESCAPES[character]);
