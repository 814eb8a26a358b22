//! Tile registers (AMX) and their product of bf16, which std has no
//! intrinsics for yet.
//!
//! Facts: Intel's Architecture Instruction Set Extensions reference, "Intel
//! AMX". Sums are in f32; subnormal numbers count as zero.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::multiplies_bf16;
use half::bf16;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile.
pub(crate) const TILE: usize = 16;

/// A tile of a product's operand.
///
/// Of the left one, a row of the tile is a row of the matrix, 32 elements of it.
/// Of the right one, row `p` has the elements `2 p` and `2 p + 1` of each of 16
/// columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [[bf16; 2 * TILE]; TILE]);

impl Tile {
    pub(crate) const ZERO: Tile = Tile([[bf16::ZERO; 2 * TILE]; TILE]);
}

/// A tile of sums.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Sums(pub(crate) [[f32; TILE]; TILE]);

impl Sums {
    pub(crate) const ZERO: Sums = Sums([[0.0; TILE]; TILE]);
}

/// Tile registers, proven to be there and allowed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

impl Amx {
    /// Asks the operating system for the registers, once.
    pub(crate) fn detect() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(allowed).then_some(Amx(()))
    }

    /// Lends this thread's registers.
    pub(crate) fn registers(self) -> Registers {
        Registers::new()
    }
}

/// Linux gives the registers, for which signal stacks must have room, to processes that ask. What fills them is
/// compiled for [`DotBf16`](super::DotBf16), which a virtual machine may lack all the same.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn allowed() -> bool {
    const TILES: libc::c_long = 18;
    const REQUEST: libc::c_long = 0x1023;
    // SAFETY: every x86-64 processor has `cpuid`, and leaf 7.
    #[allow(unused_unsafe)] // safe from Rust 1.94 on
    let features = unsafe { std::arch::x86_64::__cpuid_count(7, 0) }.edx;
    let [bf16, tile] = [22, 24].map(|bit| features >> bit & 1 == 1);
    // SAFETY: the request changes what this process may do, and no memory.
    bf16 && tile && multiplies_bf16() && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILES) } == 0
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn allowed() -> bool {
    false
}

/// The tile registers of a thread, all of them 16 rows of 64 bytes, until this is dropped.
pub(crate) struct Registers(PhantomData<*const ()>);

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
impl Registers {
    fn new() -> Self {
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            bytes: [u16; 16],
            rows: [u8; 16],
        }
        let all = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes: std::array::from_fn(|i| if i < 8 { 64 } else { 0 }),
            rows: std::array::from_fn(|i| if i < 8 { TILE as u8 } else { 0 }),
        };
        // SAFETY: an `Amx` is made where the instructions are, and the 64 bytes
        // are a valid configuration.
        unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const all, options(nostack, readonly)) };
        Registers(PhantomData)
    }

    /// `sums[i][j] += Σₖ a[i][k] · b[j][k]`, over the tiles that all have.
    #[inline]
    pub(crate) fn multiply(&mut self, a: [&[Tile]; 2], b: [&[Tile]; 2], sums: &mut [[Sums; 2]; 2]) {
        let len = a.into_iter().chain(b).map(<[Tile]>::len).min().unwrap_or(0);
        if len == 0 {
            return;
        }
        // SAFETY: the registers are configured for tiles of 16 rows of 64
        // bytes, 64 apart; each of the four operands has `len` tiles of 1024
        // bytes, and the sums are four of them.
        unsafe {
            std::arch::asm!(
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 1024]",
                "tileloadd tmm2, [{c} + {row} + 2048]",
                "tileloadd tmm3, [{c} + {row} + 3072]",
                "2:",
                "tileloadd tmm4, [{a0} + {row}]",
                "tileloadd tmm6, [{b0} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {row}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 1024",
                "add {a1}, 1024",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {len}",
                "jnz 2b",
                "tilestored [{c} + {row}], tmm0",
                "tilestored [{c} + {row} + 1024], tmm1",
                "tilestored [{c} + {row} + 2048], tmm2",
                "tilestored [{c} + {row} + 3072], tmm3",
                c = in(reg) sums.as_mut_ptr(),
                row = in(reg) 64usize,
                a0 = inout(reg) a[0].as_ptr() => _,
                a1 = inout(reg) a[1].as_ptr() => _,
                b0 = inout(reg) b[0].as_ptr() => _,
                b1 = inout(reg) b[1].as_ptr() => _,
                len = inout(reg) len => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: they are this thread's, and configured.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
impl Registers {
    // There is no `Amx` to call these with.
    fn new() -> Self {
        Registers(PhantomData)
    }

    pub(crate) fn multiply(&mut self, _a: [&[Tile]; 2], _b: [&[Tile]; 2], _sums: &mut [[Sums; 2]; 2]) {}
}
