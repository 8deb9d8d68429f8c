//! The `neuroada-ckpt` command. The library has the command line, in [`neuroada_ckpt::cli`].

fn main() -> std::process::ExitCode {
    neuroada_ckpt::cli::run(std::env::args_os())
}
