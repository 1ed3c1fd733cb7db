fn main() {
    let folder = std::env::var("MOEINF_LIB").expect("MOEINF_LIB: the folder of libmoeinf.so");
    println!("cargo:rerun-if-env-changed=MOEINF_LIB");
    println!("cargo:rustc-link-search=native={folder}");
    println!("cargo:rustc-link-lib=dylib=moeinf");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
}
