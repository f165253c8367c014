// node keep-bytecode.cjs MAIN ARGUMENTS...: runs `pqblk` with the arguments and keeps what V8 compiled.
const [node, , main, ...words] = process.argv;
const { load, keepBytecode } = require(main);

process.argv = [node, main, ...words];
process.on('exit', (code) => {
  if (code === 0) keepBytecode();
});
load('./program.cjs');
