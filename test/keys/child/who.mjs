// Prints whoAsks() of a user that no passwd knows.  node who.mjs WHO_MODULE
const { whoAsks } = await import(process.argv[2]);
process.setgid(3_000_017);
process.setuid(3_000_017);
process.stdout.write(JSON.stringify(whoAsks()));
