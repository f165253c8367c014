// Room keys/pkcs11: RFC 7512 URIs, the names of tokens and of keys on them. This file does no I/O.
//
//   pkcs11:token=HSM;object=disks;id=%01%02?module-path=/usr/lib/x.so&pin-source=file:/etc/pin
//
// Strict: an attribute that is not known, or given twice, is refused, since ignoring it could choose
// another key (RFC 7512 section 2.3). pin-value is refused because URIs end up in shell histories,
// listings and key slots. Kind `bad_uri` names the attribute, what was expected and what was found.
import { PqblkError } from '../../errors.js';
import { toHex } from '../bytes.js';
import { printable } from './wire.js';

export interface TokenUri {
  readonly token?: string;
  readonly manufacturer?: string;
  readonly model?: string;
  readonly serial?: string;
  readonly slotId?: number;
  /** The label of the key. */
  readonly object?: string;
  readonly id?: Uint8Array;
  readonly modulePath?: string;
  readonly pinFile?: string;
  readonly profile?: string;
  readonly directory?: string;
}

type Mutable = { -readonly [K in keyof TokenUri]: TokenUri[K] };

const SCHEME = 'pkcs11:';
const URI_BYTES_MAX = 4096;

const TEXT_ATTRIBUTES = ['token', 'manufacturer', 'model', 'serial', 'object'] as const;
const OTHER_ATTRIBUTES = ['id', 'slot-id', 'type'];
const QUERY_ATTRIBUTES = ['module-path', 'pin-source', 'x-pqblk-profile', 'x-pqblk-directory'];

// RFC 7512 section 2.3: what stands for itself; all else is percent-encoded.
const PATH_PLAIN = /^(?:[A-Za-z0-9\-._~:[\]@!$'()*+,=&]|%[0-9A-Fa-f]{2})*$/;
const QUERY_PLAIN = /^(?:[A-Za-z0-9\-._~:[\]@!$'()*+,=/?|]|%[0-9A-Fa-f]{2})*$/;

/** Between `&` and `;` a PIN can get into the value of an attribute, which is shown and kept. */
const LIKE_PIN = /(?<![a-z])pin[a-z_-]*=/i;

/** Says what was found only where no PIN can be: never a query's values, nor what has no name there. */
function fail(expected: string, found?: string): never {
  const instead = found === undefined ? '' : `, found ${quote(found)}`;
  throw new PqblkError('bad_uri', `PKCS#11 URI: expected ${expected}${instead}`, {
    hint: 'for example pkcs11:token=HSM;object=disks?module-path=/usr/lib/vendor.so',
  });
}

function quote(text: string): string {
  const short = text.length > 60 ? `${text.slice(0, 60)}…` : text;
  return JSON.stringify(printable(short));
}

/** Reads a URI. Kind `bad_uri`. */
export function parseTokenUri(text: string): TokenUri {
  if (text.length > URI_BYTES_MAX) fail(`at most ${URI_BYTES_MAX} characters`);
  if (!text.toLowerCase().startsWith(SCHEME)) {
    fail('something that begins with pkcs11:', /^[^?=]*/.exec(text)?.[0]);
  }
  const body = text.slice(SCHEME.length);
  const question = body.indexOf('?');
  const path = question < 0 ? body : body.slice(0, question);
  const query = question < 0 ? undefined : body.slice(question + 1);
  const uri: Mutable = {};
  for (const [name, value] of attributesOf(path, ';', PATH_PLAIN)) pathAttribute(uri, name, value);
  if (query !== undefined) {
    for (const [name, value] of attributesOf(query, '&', QUERY_PLAIN)) {
      queryAttribute(uri, name, value);
    }
  }
  return uri;
}

function attributesOf(text: string, separator: string, plain: RegExp): Map<string, string> {
  const found = new Map<string, string>();
  if (text === '') return found;
  for (const part of text.split(separator)) {
    const equals = part.indexOf('=');
    const name = equals < 0 ? part : part.slice(0, equals);
    if (equals <= 0 || !/^[a-z][a-z0-9_-]*$/.test(name)) {
      fail('attribute=value', equals <= 0 && plain === QUERY_PLAIN ? undefined : name);
    }
    if (name === 'pin-value') fail('pin-source=file:PATH', 'pin-value');
    if (found.has(name)) fail(`attribute ${name} once`, name);
    const value = part.slice(equals + 1);
    if (plain === PATH_PLAIN && [value, latin1(value)].some((one) => LIKE_PIN.test(one))) {
      fail(`"?" before pin-source, and no PIN in attribute ${name}`);
    }
    if (!plain.test(value)) {
      fail(`percent-encoding in attribute ${name}`, plain === PATH_PLAIN ? value : undefined);
    }
    found.set(name, value);
  }
  return found;
}

function pathAttribute(uri: Mutable, name: string, value: string): void {
  const text = TEXT_ATTRIBUTES.find((known) => known === name);
  if (text) {
    uri[text] = decodeText(name, value, value);
  } else if (name === 'id') {
    uri.id = decodeBytes(value);
    if (uri.id.length === 0) fail('bytes in attribute id', value);
  } else if (name === 'slot-id') {
    if (!/^\d{1,10}$/.test(value)) fail('a number in attribute slot-id', value);
    uri.slotId = Number(value);
  } else if (name === 'type') {
    if (value !== 'private') fail('type=private', `type=${value}`);
  } else {
    fail(`one of the attributes ${[...TEXT_ATTRIBUTES, ...OTHER_ATTRIBUTES].join(', ')}`, name);
  }
}

function queryAttribute(uri: Mutable, name: string, value: string): void {
  const text = decodeText(name, value);
  switch (name) {
    case 'module-path':
      uri.modulePath = absolute(name, text);
      break;
    case 'pin-source':
      uri.pinFile = absolute(name, text.replace(/^file:(\/\/(?=\/))?/, ''));
      break;
    case 'x-pqblk-profile':
      uri.profile = text;
      break;
    case 'x-pqblk-directory':
      uri.directory = absolute(name, text);
      break;
    default:
      fail(`one of the query attributes ${QUERY_ATTRIBUTES.join(', ')}`, name);
  }
}

function absolute(name: string, path: string): string {
  if (!path.startsWith('/')) fail(`an absolute path in attribute ${name}`);
  return path;
}

function decodeBytes(value: string): Uint8Array {
  const bytes: number[] = [];
  for (let at = 0; at < value.length; at += 1) {
    if (value[at] === '%') {
      bytes.push(Number.parseInt(value.slice(at + 1, at + 3), 16));
      at += 2;
    } else {
      bytes.push(value.charCodeAt(at));
    }
  }
  return Uint8Array.from(bytes);
}

/** Whatever is encoded, and however well. */
const latin1 = (value: string) => String.fromCharCode(...decodeBytes(value));

function decodeText(name: string, value: string, shown?: string): string {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(decodeBytes(value));
  } catch {
    return fail(`UTF-8 in attribute ${name}`, shown);
  }
  if (text === '' || printable(text) !== text) {
    fail(`printable text in attribute ${name}`, shown);
  }
  return text;
}

/** The path part, in one order: which key, and nothing of how to reach it. */
export function formatTokenUri(uri: TokenUri): string {
  const parts = TEXT_ATTRIBUTES.filter((name) => name !== 'object').flatMap((name) =>
    uri[name] === undefined ? [] : [`${name}=${encode(uri[name])}`],
  );
  if (uri.slotId !== undefined) parts.push(`slot-id=${uri.slotId}`);
  if (uri.object !== undefined) parts.push(`object=${encode(uri.object)}`);
  if (uri.id !== undefined) parts.push(`id=${toHex(uri.id).replace(/../g, '%$&')}`);
  return SCHEME + parts.join(';');
}

function encode(text: string): string {
  return [...new TextEncoder().encode(text)]
    .map((byte) => {
      const character = String.fromCharCode(byte);
      if (/[A-Za-z0-9\-._~:@]/.test(character)) return character;
      return `%${byte.toString(16).padStart(2, '0')}`;
    })
    .join('');
}

/**
 * A URI for a slot of a disk, where it is a hint for people and has `bytesMax` bytes: what is least
 * needed goes first.
 */
export function slotReference(uri: TokenUri, bytesMax: number): string {
  const { object: _, ...withoutLabel } = uri;
  const { token, serial, slotId, id } = uri;
  const short = {
    ...(serial ? { serial } : token !== undefined ? { token } : slotId !== undefined && { slotId }),
    ...(id !== undefined && { id }),
  };
  const found = [uri, withoutLabel, short].map(formatTokenUri);
  return found.find((text) => text.length <= bytesMax) ?? '';
}
