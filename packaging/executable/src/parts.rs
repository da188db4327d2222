//! What stands behind the program in its own file: the packed Python modules and the shared libraries.
//!
//! ```text
//! ELF │ part │ part │ … │ table: name[40] offset:u64 length:u64, an entry each │ trailer
//! trailer, the last 64 bytes: sha256[32] of all before │ size:u64 of the file │ entries:u64 │ "flanctl parts 1\n"
//! ```
//! Numbers are little endian; parts begin at multiples of `ALIGNMENT`. `packaging/freeze/assemble.py` writes it.

use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::io::AsRawFd;

const MAGIC: &[u8; 16] = b"flanctl parts 1\n";
const TRAILER: u64 = 64;
const ENTRY: usize = 56;
const NAME: usize = 40;
const MOST_ENTRIES: u64 = 64;

/// One piece behind the program.
pub struct Part {
    pub name: String,
    pub offset: u64,
    pub length: u64,
}

/// The file that runs, opened, and what stands in it.
pub struct Parts {
    pub list: Vec<Part>,
    file: File,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The trailer of a file that is as long as it was made, or what is wrong.
fn trailer(file: &File) -> Result<([u8; TRAILER as usize], u64), String> {
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    let mut end = [0; TRAILER as usize];
    let at = size.checked_sub(TRAILER).ok_or("it is empty")?;
    file.read_exact_at(&mut end, at).map_err(|error| error.to_string())?;
    if &end[48..] != MAGIC {
        return Err(format!("its end is missing or overwritten ({size} bytes are there)"));
    }
    if number(&end[32..40]) != size {
        return Err(format!("it has {size} bytes instead of {}", number(&end[32..40])));
    }
    Ok((end, at))
}

impl Parts {
    /// Reads the table of the running program; the error says what is wrong with its file.
    pub fn open() -> Result<Self, String> {
        let file = File::open("/proc/self/exe").map_err(|error| format!("/proc/self/exe: {error}"))?;
        let (end, at) = trailer(&file)?;
        let entries = number(&end[40..48]);
        if entries > MOST_ENTRIES {
            return Err("its table of contents makes no sense".into());
        }
        let mut table = vec![0; entries as usize * ENTRY];
        let begin = at.checked_sub(table.len() as u64).ok_or("its table of contents makes no sense")?;
        file.read_exact_at(&mut table, begin).map_err(|error| error.to_string())?;
        let mut list = Vec::new();
        for entry in table.chunks_exact(ENTRY) {
            let name = entry[..NAME].split(|byte| *byte == 0).next().unwrap_or_default();
            let (offset, length) = (number(&entry[NAME..NAME + 8]), number(&entry[NAME + 8..]));
            if offset.checked_add(length).map_or(true, |end| end > begin) {
                return Err("its table of contents makes no sense".into());
            }
            list.push(Part { name: String::from_utf8_lossy(name).into_owned(), offset, length });
        }
        Ok(Self { list, file })
    }

    /// The bytes of a part, as pages of the file, for the life of the process.
    pub fn map(&self, name: &str) -> Result<&'static [u8], String> {
        let part = self.list.iter().find(|part| part.name == name).ok_or(format!("it holds no {name}"))?;
        let (length, offset) = (part.length as usize, part.offset as libc::off_t);
        // SAFETY: a new private mapping, never unmapped or written. Nobody can write to a running program's file
        // (ETXTBSY), so it does not change beneath us.
        unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                self.file.as_raw_fd(),
                offset,
            );
            if start == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error().to_string());
            }
            Ok(std::slice::from_raw_parts(start.cast(), length))
        }
    }
}

/// Reads the whole file; what is wrong with it, or None where it is as it was made. Allocates nothing where it can be read
/// and is as long as it should be, so that a signal handler can call it.
pub fn damage() -> Option<Cow<'static, str>> {
    let file = match File::open("/proc/self/exe") {
        Ok(file) => file,
        Err(error) => return Some(error.to_string().into()),
    };
    let (end, at) = match trailer(&file) {
        Ok(found) => found,
        Err(why) => return Some(why.into()),
    };
    let mut hash = Sha256::new();
    let mut block = [0; 32 << 10];
    let mut done = 0;
    while done < at {
        let wanted = block.len().min((at - done) as usize);
        match file.read_at(&mut block[..wanted], done) {
            Ok(0) => return Some("it became shorter".into()),
            Ok(got) => {
                hash.update(&block[..got]);
                done += got as u64;
            }
            Err(error) => return Some(error.to_string().into()),
        }
    }
    (hash.finalize()[..] != end[..32]).then(|| "its content was altered".into())
}
