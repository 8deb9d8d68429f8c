//! The `neuroada-ckpt` command: words in, words out. Everything it can do, the library does.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
