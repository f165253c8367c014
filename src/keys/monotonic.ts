// Room keys/: a clock that nobody sets back, for patience. Node's `performance` would do, but to name
// it loads perf_hooks, a fiftieth of what a short command takes.
export const monotonicMs = () => process.uptime() * 1000;
