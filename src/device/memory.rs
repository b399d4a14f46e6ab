//! Tensors over shared memory. Those of the host are borrowed, with borrows checked when they are taken; those of a GPU are reached by
//! address, by kernels that run in the order in which they were queued.
//!
//! A graph step reads and writes many tensors of one arena at once. The compiler cannot see that the ranges are disjoint, so each
//! tensor carries a borrow flag as `RefCell` does: any number of readers or one writer, and a violation is a bug that panics at
//! once. Views of one tensor share its flag.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::gpu::Memory as GpuMemory;
use super::launch::{ConstPtr, MutPtr};
use super::{DType, Device, trace};
use crate::error::Error;

/// A type that tensors can hold.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Its tag.
    const DTYPE: DType;
}

macro_rules! element {
    ($($t:ty = $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
element!(f32 = F32, f64 = F64, half::bf16 = BF16, half::f16 = F16, u16 = U16, u32 = U32, u64 = U64);

/// One cache line; the unit of allocation, so that every allocation is aligned to 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Where the elements are.
enum Memory {
    Host(HostMemory),
    Gpu(GpuMemory),
}

/// What a process does when the host has no memory left for a tensor.
type Hook = Box<dyn Fn(Error) + Send + Sync>;

static ON_EXHAUSTED: Mutex<Option<Hook>> = Mutex::new(None);

/// Calls `hook` when the host has no memory left for a tensor, in place of one named before: it says so and ends the process, which
/// else aborts.
pub fn on_exhausted(hook: impl Fn(Error) + Send + Sync + 'static) {
    *ON_EXHAUSTED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
}

fn exhausted(bytes: usize) {
    let gib = bytes as f64 / f64::from(1 << 30);
    let error = Error::device(format!("out of memory: the system has no {gib:.2} GiB for a tensor"))
        .remedy("use a smaller batch or model, or raise the limit (ulimit -v); train --dry-run tells what a run needs");
    if let Some(hook) = &*ON_EXHAUSTED.lock().unwrap_or_else(PoisonError::into_inner) {
        hook(error);
    }
}

/// A host allocation, reached only through borrowed ranges.
struct HostMemory {
    start: *mut u8,
    lines: usize,
}

// SAFETY: `HostMemory` is a plain allocation; every access goes through `Tensor::read`/`write`, whose flags forbid aliased writes.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    fn zeroed(bytes: usize) -> Self {
        let lines = bytes.div_ceil(64).max(1);
        let layout = Self::layout(lines);
        // SAFETY: the layout has a positive size; all-zero bytes are valid for every `Element`.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        if start.is_null() {
            exhausted(bytes);
            std::alloc::handle_alloc_error(layout);
        }
        HostMemory { start, lines }
    }

    fn layout(lines: usize) -> std::alloc::Layout {
        std::alloc::Layout::array::<Line>(lines)
            .unwrap_or_else(|_| panic!("allocation of {lines} cache lines overflows"))
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { std::alloc::dealloc(self.start, Self::layout(self.lines)) }
    }
}

/// Readers (> 0), one writer (−1) or nobody (0).
#[derive(Default)]
struct Flag(AtomicIsize);

impl Flag {
    fn read(&self) {
        let taken = self.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, |n| (n >= 0).then_some(n + 1));
        assert!(taken.is_ok(), "tensor is read while it is being written");
    }

    fn write(&self) {
        let taken = self.0.compare_exchange(0, -1, Ordering::Acquire, Ordering::Relaxed);
        assert!(taken.is_ok(), "tensor is written while it is in use");
    }

    fn release(&self) {
        let _ = self.0.fetch_update(Ordering::Release, Ordering::Relaxed, |n| Some(if n > 0 { n - 1 } else { 0 }));
    }
}

/// A handle to elements of one type in device memory. Cloning and slicing make handles to the same elements.
#[derive(Clone)]
pub struct Tensor {
    memory: Arc<Memory>,
    offset: usize,
    len: usize,
    dtype: DType,
    own: Arc<Flag>,
    /// Held shared by every borrow of an arena's tensors, exclusively by borrows of the whole arena.
    arena: Option<Arc<Flag>>,
    whole: bool,
}

impl Tensor {
    /// A zeroed tensor of its own on the host.
    pub fn zeros(dtype: DType, len: usize) -> Self {
        Self::zeros_on(Device::Cpu, dtype, len)
    }

    /// [`Device::zeros`].
    pub(super) fn zeros_on(device: Device, dtype: DType, len: usize) -> Self {
        let bytes = len * dtype.size();
        let memory = Arc::new(match device {
            Device::Cpu => Memory::Host(HostMemory::zeroed(bytes)),
            Device::Gpu(gpu) => Memory::Gpu(gpu.memory(bytes, 0)),
        });
        Tensor { memory, offset: 0, len, dtype, own: Arc::default(), arena: None, whole: false }
    }

    /// A tensor on the host that holds a copy of `data`.
    pub fn from_slice<T: Element>(data: &[T]) -> Self {
        let t = Self::zeros(T::DTYPE, data.len());
        t.write::<T>().copy_from_slice(data);
        t
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A handle to some of the elements; borrows through it count against the whole tensor.
    pub fn slice(&self, range: Range<usize>) -> Tensor {
        assert!(range.start <= range.end && range.end <= self.len, "slice {range:?} of {} elements", self.len);
        Tensor { offset: self.offset + range.start * self.dtype.size(), len: range.len(), ..self.clone() }
    }

    /// Copies `data` to the first elements.
    pub fn upload<T: Element>(&self, data: &[T]) {
        match &*self.memory {
            Memory::Host(_) => {
                trace::piece(|| trace::Piece::Upload(size_of_val(data)));
                self.write::<T>()[..data.len()].copy_from_slice(data);
            }
            Memory::Gpu(memory) => {
                self.check::<T>();
                assert!(data.len() <= self.len, "upload of {} elements to {}", data.len(), self.len);
                memory.write(self.offset, bytemuck::cast_slice(data));
            }
        }
    }

    /// Copies the elements out, on a GPU after all work that was queued before; zeros when that failed, see [`Device::check`].
    pub fn to_vec<T: Element>(&self) -> Vec<T> {
        match &*self.memory {
            Memory::Host(_) => self.read::<T>().to_vec(),
            Memory::Gpu(memory) => {
                self.check::<T>();
                let mut data = vec![T::zeroed(); self.len];
                memory.read(self.offset, bytemuck::cast_slice_mut(&mut data));
                data
            }
        }
    }

    /// Queues, on a GPU, the copy that [`Self::end_read`] waits for.
    pub fn begin_read(&self) {
        if let Memory::Gpu(memory) = &*self.memory {
            memory.begin_read(self.offset, self.len * self.dtype.size());
        }
    }

    /// The elements as they were at [`Self::begin_read`], the last such call of all. Work that was queued since is not waited for.
    pub fn end_read<T: Element>(&self) -> Vec<T> {
        match &*self.memory {
            Memory::Host(_) => self.read::<T>().to_vec(),
            Memory::Gpu(memory) => {
                self.check::<T>();
                let mut data = vec![T::zeroed(); self.len];
                memory.end_read(self.offset, bytemuck::cast_slice_mut(&mut data));
                data
            }
        }
    }

    /// Sets the first `count` elements to zero.
    pub fn clear(&self, count: usize) {
        assert!(count <= self.len, "{count} of {} elements cleared", self.len);
        match &*self.memory {
            Memory::Host(_) => {
                let bytes = self.slice(0..count);
                bytes.enter();
                bytes.own.write();
                // SAFETY: in bounds, borrowed for writing, and zero bytes are valid for every `Element`.
                unsafe { bytes.pointer::<u8>().write_bytes(0, count * self.dtype.size()) };
                bytes.leave();
            }
            Memory::Gpu(memory) => memory.fill(self.offset, count * self.dtype.size(), 0),
        }
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        match &*self.memory {
            Memory::Host(_) => Device::Cpu,
            Memory::Gpu(memory) => Device::Gpu(memory.gpu()),
        }
    }

    /// Address on the GPU of the first element.
    pub fn address(&self) -> u64 {
        match &*self.memory {
            Memory::Host(_) => panic!("address of a tensor of the host"),
            Memory::Gpu(memory) => memory.address() + self.offset as u64,
        }
    }

    /// The elements for a kernel that reads them.
    pub fn get<T: Element>(&self) -> ConstPtr<T> {
        self.check::<T>();
        ConstPtr::new(self.address())
    }

    /// The elements for a kernel that writes them.
    pub fn get_mut<T: Element>(&self) -> MutPtr<T> {
        self.check::<T>();
        MutPtr::new(self.address())
    }

    /// Borrows the elements for reading.
    pub fn read<T: Element>(&self) -> Read<'_, T> {
        self.check::<T>();
        self.enter();
        self.own.read();
        Read { tensor: self, of: PhantomData }
    }

    /// Borrows the elements for writing.
    pub fn write<T: Element>(&self) -> Write<'_, T> {
        self.check::<T>();
        self.enter();
        self.own.write();
        Write { tensor: self, of: PhantomData }
    }

    fn check<T: Element>(&self) {
        assert!(T::DTYPE == self.dtype, "tensor of {:?} borrowed as {:?}", self.dtype, T::DTYPE);
    }

    fn enter(&self) {
        if let Some(arena) = &self.arena {
            if self.whole { arena.write() } else { arena.read() }
        }
    }

    fn leave(&self) {
        self.own.release();
        if let Some(arena) = &self.arena {
            arena.release();
        }
    }

    fn pointer<T>(&self) -> *mut T {
        let Memory::Host(memory) = &*self.memory else { panic!("a tensor of the GPU is borrowed on the host") };
        debug_assert!(self.offset + self.len * size_of::<T>() <= memory.lines * 64);
        // SAFETY: constructors and `slice` keep `offset + len · size` inside the allocation.
        unsafe { memory.start.add(self.offset).cast() }
    }
}

/// Elements borrowed for reading.
pub struct Read<'a, T> {
    tensor: &'a Tensor,
    of: PhantomData<T>,
}

impl<T: Element> Deref for Read<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: in bounds and aligned (offsets are multiples of the element size); the flag keeps writers out while this lives.
        unsafe { std::slice::from_raw_parts(self.tensor.pointer(), self.tensor.len) }
    }
}

impl<T> Drop for Read<'_, T> {
    fn drop(&mut self) {
        self.tensor.leave();
    }
}

/// Elements borrowed for writing.
pub struct Write<'a, T> {
    tensor: &'a Tensor,
    of: PhantomData<T>,
}

impl<T: Element> Deref for Write<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: as for `Read`; this is the only borrow.
        unsafe { std::slice::from_raw_parts(self.tensor.pointer(), self.tensor.len) }
    }
}

impl<T: Element> DerefMut for Write<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `Read`; the flag makes this the only borrow of these elements.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.pointer(), self.tensor.len) }
    }
}

impl<T> Drop for Write<'_, T> {
    fn drop(&mut self) {
        self.tensor.leave();
    }
}

/// Elements to whose multiples the parts of an arena are aligned: 128 bytes in bf16, and the same places in every type.
pub const ALIGNMENT: usize = 64;

/// One allocation cut into consecutive tensors of one type, each starting at a multiple of [`ALIGNMENT`] elements.
pub struct Arena {
    tensors: Vec<Tensor>,
    whole: Tensor,
}

impl Arena {
    /// Zeroed memory for tensors of these lengths.
    pub fn zeros(device: Device, dtype: DType, lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut end = 0;
        let ranges: Vec<Range<usize>> = lengths
            .into_iter()
            .map(|len| {
                let start = end;
                end += len.next_multiple_of(ALIGNMENT);
                start..start + len
            })
            .collect();
        let flag = Arc::new(Flag::default());
        let whole = Tensor { arena: Some(flag), whole: true, ..device.zeros(dtype, end) };
        let tensors =
            ranges.into_iter().map(|r| Tensor { whole: false, own: Arc::default(), ..whole.slice(r) }).collect();
        Arena { tensors, whole }
    }

    /// The tensor of table entry `i`.
    pub fn tensor(&self, i: usize) -> &Tensor {
        &self.tensors[i]
    }

    /// All elements, alignment gaps (always zero) included; excludes borrows of the parts.
    pub fn whole(&self) -> &Tensor {
        &self.whole
    }

    /// First element of entry `i` in [`Self::whole`].
    pub fn offset(&self, i: usize) -> usize {
        self.tensors[i].offset / self.whole.dtype.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arena_parts_are_disjoint_and_the_whole_sees_them() {
        let a = Arena::zeros(Device::Cpu, DType::F32, [3, 17, 1]);
        let (mut x, mut y) = (a.tensor(0).write::<f32>(), a.tensor(1).write::<f32>());
        x.fill(1.0);
        y.fill(2.0);
        drop((x, y));
        let all = a.whole().read::<f32>();
        assert_eq!(all.len(), 3 * 64);
        assert_eq!((all[2], all[3], all[64], all[80], all[81]), (1.0, 0.0, 2.0, 2.0, 0.0));
        assert_eq!(a.offset(2), 128);
    }

    #[test]
    #[should_panic(expected = "written while it is in use")]
    fn a_slice_cannot_be_written_while_its_tensor_is_read() {
        let t = Tensor::from_slice(&[1.0f32, 2.0]);
        let part = t.slice(0..1);
        let _r = t.read::<f32>();
        let _w = part.write::<f32>();
    }

    #[test]
    #[should_panic(expected = "written while it is in use")]
    fn the_whole_arena_excludes_its_parts() {
        let a = Arena::zeros(Device::Cpu, DType::F64, [8]);
        let _r = a.tensor(0).read::<f64>();
        let _w = a.whole().read::<f64>();
    }

    #[test]
    fn borrows_end_with_their_guards() {
        let t = Tensor::from_slice(&[1u32, 2, 3]);
        {
            let part = t.slice(1..3);
            let (a, b) = (t.read::<u32>(), part.read::<u32>());
            assert_eq!((a.len(), b[0]), (3, 2));
        }
        t.write::<u32>()[0] = 9;
        assert_eq!(t.to_vec::<u32>(), [9, 2, 3]);
    }
}
