//! Compiles the public contract, without protoc.

use std::path::PathBuf;
use std::{env, error::Error, fs};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from("proto");
    let files = ["lunplug.proto", "node.proto", "vm.proto", "volume.proto"]
        .map(|name| root.join("lunplug/v1").join(name));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, [root])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    // For gRPC reflection.
    fs::write(out.join("lunplug.bin"), descriptors.encode_to_vec())?;
    // It holds secrets: printed as src/api/mod.rs says.
    let secret = [".lunplug.v1.ChapCredentials"];
    tonic_prost_build::configure().skip_debug(secret).compile_fds(descriptors)?;
    Ok(())
}
