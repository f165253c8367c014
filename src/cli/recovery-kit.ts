// Room cli/: the recovery kit: one page to print, with a code that opens one disk.
//
// The page is self-contained HTML without scripts. The code is on it and nowhere else, four lines that
// check themselves and the same as a QR code. The file has to exist before the slot does, or a crash
// between the two would leave a slot that nobody can open.
import { open, unlink } from 'node:fs/promises';
import { fromSystem } from '../errors.js';
import {
  encodeRecoveryCode,
  fingerprintOf,
  type KemId,
  newRecoverySecret,
  RECOVERY_PREFIX,
  type Recipient,
  recoveryRecipient,
  type Secret,
  SlotRole,
  toHex,
} from '../index.js';

export interface RecoveryKit {
  readonly recipient: Recipient;
  /** The bytes of the code, to test the slot with. */
  readonly secret: Secret;
  /** Takes the page away again. */
  discard(): Promise<void>;
  [Symbol.dispose](): void;
}

export interface KitFacts {
  readonly disk: string;
  readonly volumeUuid: string;
  readonly label: string;
}

/** Draws a code and writes its page to a new file, mode 0600. Kind `exists`. */
export async function makeRecoveryKit(
  path: string,
  kem: KemId,
  facts: KitFacts,
): Promise<RecoveryKit> {
  const secret = newRecoverySecret();
  try {
    const recipient = await recoveryRecipient(secret, kem, facts.label);
    await writePage(path, await page(encodeRecoveryCode(secret), recipient, facts));
    return {
      recipient: { ...recipient, role: SlotRole.recovery },
      secret,
      discard: () => unlink(path),
      [Symbol.dispose]: () => secret.wipe(),
    };
  } catch (error) {
    secret.wipe();
    throw error;
  }
}

async function writePage(path: string, html: string): Promise<void> {
  try {
    const file = await open(path, 'wx', 0o600);
    try {
      await file.writeFile(html);
      await file.sync();
    } finally {
      await file.close();
    }
  } catch (error) {
    throw fromSystem(error, { path, operation: 'write recovery kit' });
  }
}

const ESCAPES: Readonly<Record<string, string>> = {
  '&': '&amp;',
  '<': '&lt;',
  '>': '&gt;',
  '"': '&quot;',
};
const escaped = (text: string) => text.replaceAll(/[&<>"]/g, (sign) => ESCAPES[sign] as string);

/** Modules of a QR code as one SVG path; the quiet zone is the page's business. */
async function qrCode(text: string): Promise<string> {
  const { default: qrcode } = await import('qrcode-generator');
  const code = qrcode(0, 'M'); // the smallest that fits, 15 % of it may be unreadable
  code.addData(text, 'Alphanumeric');
  code.make();
  const size = code.getModuleCount();
  let path = '';
  for (let row = 0; row < size; row += 1) {
    for (let column = 0; column < size; column += 1) {
      if (code.isDark(row, column)) path += `M${column} ${row}h1v1h-1z`;
    }
  }
  return (
    `<svg viewBox="-4 -4 ${size + 8} ${size + 8}" shape-rendering="crispEdges" role="img" ` +
    `aria-label="recovery code"><path d="${path}"/></svg>`
  );
}

async function page(lines: string[], recipient: Recipient, facts: KitFacts): Promise<string> {
  const rows = lines
    .map((line, index) => {
      const groups = line.split(' ').map((group) => `<td>${group}</td>`);
      return `<tr><th>${index + 1}.</th>${groups.join('')}</tr>`;
    })
    .join('\n');
  const code = RECOVERY_PREFIX + lines.join('').replaceAll(' ', '');
  const fingerprint = toHex(fingerprintOf(recipient.encapsulationKey));
  const rest: [string, string][] = [
    ['Disk', facts.disk],
    ['Volume', facts.volumeUuid],
    ['Slot', facts.label],
    ['Key', fingerprint.replaceAll(/(.{8})/g, '$1 ').trim()],
    ['Made', `${new Date().toISOString().slice(0, 16).replace('T', ' ')} UTC`],
  ];
  const parts: Readonly<Record<string, string>> = {
    ROWS: rows,
    FACTS: rest.map(([k, v]) => `<dt>${k}</dt><dd>${escaped(v)}</dd>`).join('\n'),
    QR: await qrCode(code),
    TITLE: `Recovery kit: ${escaped(facts.disk)}`,
  };
  // In one pass, by a function: names may hold whatever means something in a template.
  return PAGE.replaceAll(/%([A-Z]+)%/g, (_, name: string) => parts[name] as string);
}

const PAGE = `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>%TITLE%</title>
<style>
  @page { size: A4; margin: 20mm; }
  body { font: 11pt/1.45 sans-serif; color: #000; background: #fff; max-width: 170mm; margin: 8mm auto; }
  h1 { font-size: 20pt; margin: 0 0 2mm; }
  h2 { font-size: 12pt; margin: 7mm 0 2mm; }
  .secret { border: 0.6mm solid #000; padding: 5mm; display: flex; gap: 8mm; align-items: center; }
  table { font: bold 17pt/1.9 monospace; border-collapse: collapse; }
  td { padding: 0 3.2mm; letter-spacing: 0.6mm; }
  th { font-weight: normal; color: #555; padding-right: 2mm; }
  svg { width: 46mm; height: 46mm; flex: none; }
  dl { display: grid; grid-template-columns: 20mm 1fr; gap: 1mm 4mm; margin: 0; }
  dt { color: #555; }
  dd { margin: 0; overflow-wrap: anywhere; font-family: monospace; font-size: 10pt; }
  li { margin-bottom: 1.5mm; }
  code { font-size: 10pt; }
</style>
</head>
<body>
<h1>Recovery kit</h1>
<p><strong>Whoever has this page can open the disk below.</strong> Print it, delete the file, and lock the
page away.</p>
<div class="secret">
<table>
%ROWS%
</table>
%QR%
</div>
<h2>What it opens</h2>
<dl>
%FACTS%
</dl>
<h2>How to use it</h2>
<ol>
<li>Test it now, before it goes into the safe: <code>pqblk slot test DISK --recovery-code -</code></li>
<li>To open the disk with it, give <code>--recovery-code -</code> to any command and type the 64
characters, or scan the square into a file and name that. O and 0 are the same, and so are I, L and 1. Each
line checks itself: a misread one is named.</li>
<li>Then make a new key, let it open the disk with <code>pqblk slot add DISK KEY --recovery-code -</code>, and
make a new kit.</li>
<li>If this page is lost or somebody has seen it, take its slot away: <code>pqblk slot revoke DISK
SLOT</code>.</li>
</ol>
</body>
</html>
`;
