//! Generates messages, clients and servers from `proto/`.

use std::{fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out = Path::new(&std::env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("proto");
    fs::create_dir_all(&out).expect("make the output directory");
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/vmm.proto", "proto/guest.proto", "proto/config.proto", "proto/runtimeoptions.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("generate code from proto/");
    let modules = ["vmm", "vmm_ttrpc", "guest", "guest_ttrpc", "config", "config_ttrpc", "runtimeoptions"];
    let index: String = modules.iter().map(|name| format!("pub mod {name};\n")).collect();
    fs::write(out.join("mod.rs"), index).expect("write the module index");
    println!("cargo::rerun-if-changed=proto");
}
