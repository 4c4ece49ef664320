//! Generates messages, clients and servers from `proto/`.

use std::{fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out = Path::new(&std::env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("proto");
    fs::create_dir_all(&out).expect("make the output directory");
    Codegen::new()
        .out_dir(&out)
        .inputs([
            "proto/vmm.proto",
            "proto/guest.proto",
            "proto/config.proto",
            "proto/sandbox.proto",
            "proto/runtimeoptions.proto",
        ])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("generate code from proto/");
    raw_identifier(&out.join("config_ttrpc.rs"), "use");
    let modules = [
        "vmm",
        "vmm_ttrpc",
        "guest",
        "guest_ttrpc",
        "config",
        "config_ttrpc",
        "sandbox",
        "sandbox_ttrpc",
        "runtimeoptions",
    ];
    let index: String = modules.iter().map(|name| format!("pub mod {name};\n")).collect();
    fs::write(out.join("mod.rs"), index).expect("write the module index");
    println!("cargo::rerun-if-changed=proto");
}

/// A call may be named like a keyword of Rust's, of which the generator knows nothing.
fn raw_identifier(generated: &Path, keyword: &str) {
    let text = fs::read_to_string(generated).expect("read generated code");
    let text = text.replace(&format!(" fn {keyword}("), &format!(" fn r#{keyword}("));
    let text = text.replace(&format!(", {keyword})"), &format!(", r#{keyword})"));
    fs::write(generated, text).expect("write generated code");
}
