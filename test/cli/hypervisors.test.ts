// What docs/vhost-user.md shows for hypervisors that do not run here: libvirt's own schema reads it.
import { spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';
import { scratch } from './helpers.js';

const GUIDE = fileURLToPath(new URL('../../docs/vhost-user.md', import.meta.url));
const dir = scratch();

it('shows a domain that libvirt takes', (context) => {
  if (spawnSync('virt-xml-validate', ['--version']).error) {
    console.log('SKIP: virt-xml-validate is not here; scripts/setup --test installs it');
    context.skip();
  }
  const domain = String(/```xml\n([\s\S]*?)```/.exec(readFileSync(GUIDE, 'utf8'))?.[1]);
  const validate = (text: string) => {
    const file = join(dir, 'domain.xml');
    writeFileSync(file, text);
    return spawnSync('virt-xml-validate', [file, 'domain'], { encoding: 'utf8' });
  };
  expect(validate(domain)).toMatchObject({ status: 0 });
  // It would say so.
  expect(validate(domain.replace("type='unix'", "type='unics'")).status).not.toBe(0);
});
