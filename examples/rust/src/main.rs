//! Experts of a checkpoint from Rust: a lease that ends by itself, read by two threads.
//! MOEINF_LIB=$(dirname $(python -c 'import moeinf; print(moeinf.get_library())')) cargo run -- experts.txt
use std::ffi::{c_char, c_void, CStr, CString};

#[repr(C)]
struct CacheOptions(usize, u32, [u64; 9]); // slots 0: all experts; the other fields as usual
#[repr(C)]
struct Step {
    size: usize, api_version: u32, layer: i32, experts: *const i32, num_experts: i32,
    counts: *const i32, prefill: i32, new_sequence: i32, caller: i64,
}
#[repr(C)]
#[derive(Clone, Copy)]
struct Ready { position: i32, slot: i32, address: *const u8 }
#[repr(C)]
struct Info(usize, u32, i32, i32, u64, u64, i64, i64);

extern "C" {
    fn moeinf_last_error() -> *const c_char;
    fn moeinf_store_open(path: *const c_char, version: u32, store: *mut *mut c_void) -> i32;
    fn moeinf_store_get_info(store: *mut c_void, info: *mut Info) -> i32;
    fn moeinf_store_destroy(store: *mut c_void) -> i32;
    fn moeinf_cache_create(s: *mut c_void, o: *const CacheOptions, c: *mut *mut c_void) -> i32;
    fn moeinf_cache_destroy(cache: *mut c_void) -> i32;
    fn moeinf_acquire(c: *mut c_void, s: *const Step, r: *mut Ready, l: *mut *mut c_void) -> i32;
    fn moeinf_lease_release(lease: *mut c_void, stream: *mut c_void) -> i32;
}

fn check(status: i32) -> Result<(), String> {
    if status == 0 { return Ok(()); }
    Err(unsafe { CStr::from_ptr(moeinf_last_error()) }.to_string_lossy().into_owned())
}

struct Cache(*mut c_void);
unsafe impl Send for Cache {} // moeinf.h: every function may be called by any thread
unsafe impl Sync for Cache {}
impl Drop for Cache { fn drop(&mut self) { unsafe { moeinf_cache_destroy(self.0); } } }

struct Lease<'a> { handle: *mut c_void, ready: Vec<Ready>, nbytes: usize, _cache: &'a Cache }
impl Lease<'_> {
    fn bytes(&self, i: usize) -> &[u8] { unsafe { std::slice::from_raw_parts(self.ready[i].address, self.nbytes) } }
}
impl Drop for Lease<'_> { fn drop(&mut self) { unsafe { moeinf_lease_release(self.handle, std::ptr::null_mut()); } } }

fn acquire<'a>(cache: &'a Cache, layer: i32, experts: &[i32], nbytes: usize) -> Result<Lease<'a>, String> {
    let step = Step { size: std::mem::size_of::<Step>(), api_version: 1, layer, experts: experts.as_ptr(),
        num_experts: experts.len() as i32, counts: std::ptr::null(), prefill: 0, new_sequence: 0, caller: 0 };
    let mut ready = vec![Ready { position: 0, slot: 0, address: std::ptr::null() }; experts.len()];
    let mut handle = std::ptr::null_mut();
    check(unsafe { moeinf_acquire(cache.0, &step, ready.as_mut_ptr(), &mut handle) })?;
    Ok(Lease { handle, ready, nbytes, _cache: cache })
}

fn main() -> Result<(), String> {
    let path = CString::new(std::env::args().nth(1).ok_or("usage: DESCRIPTION")?).unwrap();
    let (mut store, mut cache) = (std::ptr::null_mut(), std::ptr::null_mut());
    check(unsafe { moeinf_store_open(path.as_ptr(), 1, &mut store) })?;
    let mut info = Info(std::mem::size_of::<Info>(), 1, 0, 0, 0, 0, 0, 0);
    check(unsafe { moeinf_store_get_info(store, &mut info) })?;
    let options = CacheOptions(std::mem::size_of::<CacheOptions>(), 1, [0; 9]);
    check(unsafe { moeinf_cache_create(store, &options, &mut cache) })?;
    let cache = Cache(cache);
    std::thread::scope(|threads| {
        for layer in 0..info.2.min(2) {
            let cache = &cache;
            threads.spawn(move || match acquire(cache, layer, &[0, 1], info.5 as usize) {
                Ok(lease) => println!("layer {layer}: {}", lease.bytes(1).iter().map(|&b| b as u64).sum::<u64>()),
                Err(error) => eprintln!("layer {layer}: {error}"),
            });
        }
    });
    drop(cache);
    check(unsafe { moeinf_store_destroy(store) })
}
