// qemu-img, which times its own key derivation when it makes a LUKS image, and gives up now and then:
// "Unable to get accurate CPU usage".
const TRIES = 8;

/** What qemu-img printed. */
export async function qemuImg(bench, args) {
  for (let left = TRIES - 1; ; left -= 1) {
    try {
      return await bench.run('qemu-img', args);
    } catch (error) {
      if (left === 0 || !error.message.includes('accurate CPU usage')) throw error;
    }
  }
}
