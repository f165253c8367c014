// Room cli/: `pqblk export`: the content of a disk into a new raw or qcow2 file.
import { type Command, Option } from 'commander';
import { PqblkError } from '../errors.js';
import { type ExportOptions, exportFile } from '../index.js';
import { copying, showCopy } from './copying.js';
import { addOpenOptions, formatByName, keyOption, type OpenFlags, withDisk } from './opening.js';
import { examples, jsonOption, sizeArgument } from './options.js';
import type { Terminal } from './terminal.js';

interface Flags extends OpenFlags {
  outputFormat?: 'raw' | 'qcow2';
  clusterSize?: number;
  force?: boolean;
  json?: boolean;
}

export function addExport(program: Command, terminal: Terminal): void {
  const command = program
    .command('export <disk> <file>')
    .description('Copy a disk into a new raw or qcow2 file, in plain text. Zeros become holes.')
    .addOption(
      new Option('--output-format <format>', 'what to make (default: by the name)').choices([
        'raw',
        'qcow2',
      ]),
    )
    .addOption(
      new Option('--cluster-size <size>', 'qcow2: unit of allocation').argParser(sizeArgument),
    )
    .addOption(keyOption());
  addOpenOptions(command)
    .option('--force', 'replace a file that is there; allow directories of the system')
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples(
        'pqblk export vm.sealed vm.qcow2 --key alice',
        'pqblk export vm.qcow2 vm.dump --output-format raw',
      ),
    )
    .action(async (path: string, file: string, flags: Flags) => {
      const options = exportOptions(file, flags);
      const result = await withDisk(path, flags, { readOnly: true }, (disk) =>
        copying(terminal, 'export', (work) => exportFile(disk, file, { ...options, ...work })),
      );
      showCopy(terminal, path, file, result, flags.json);
    });
}

function exportOptions(file: string, flags: Flags): ExportOptions {
  const format = flags.outputFormat ?? formatByName(file);
  if (format === undefined || format === 'sealed') {
    throw new PqblkError('usage', `the name '${file}' does not say what to make`, {
      hint: 'say --output-format raw or qcow2',
    });
  }
  return {
    format,
    ...(flags.clusterSize !== undefined && { clusterSize: flags.clusterSize }),
    ...(flags.force && { overwrite: true, allowSystemDirectory: true }),
  };
}
