//! containerd finds this program by its name: `--runtime io.containerd.caisson.v2`.

fn main() -> std::process::ExitCode {
    caisson_shim::run()
}
