//! What seals and opens messages once the handshake is over: Noise's transport phase (sections 4.2, 5.1 and 11.3 of its
//! specification, cipher AESGCM), in the buffers where the bytes stand.

use anyhow::{Context, Result, bail};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};
use snow::HandshakeState;

/// Bytes of what proves that a message is the other end's.
pub const TAG: usize = 16;
const KEY: usize = 32;
/// Messages after which both sides change their keys: far below what AES-GCM allows.
const REKEY: u64 = 1 << 20;
/// The number of a message that is none: what it would be sealed to is the next key.
const NO_MESSAGE: u64 = u64::MAX;

/// One direction of a stream: each message has the next number, and no number is used twice with a key.
pub struct Cipher {
    key: LessSafeKey,
    next: u64,
}

impl Cipher {
    /// The two that a handshake has led to: for what we send, and for what we receive.
    ///
    /// # Errors
    /// When it has not come to its end.
    pub fn pair(mut state: HandshakeState) -> Result<(Cipher, Cipher)> {
        if !state.is_handshake_finished() {
            bail!("the handshake has not come to its end");
        }
        // Taken once: a second pair would use the same numbers again.
        let (first, second) = state.dangerously_get_raw_split();
        let (ours, theirs) = match state.is_initiator() {
            true => (first, second),
            false => (second, first),
        };
        Ok((Cipher::new(&ours)?, Cipher::new(&theirs)?))
    }

    fn new(key: &[u8; KEY]) -> Result<Cipher> {
        Ok(Cipher {
            key: key_of(key)?,
            next: 0,
        })
    }

    /// Encrypts the next message where it stands; its tag.
    ///
    /// # Errors
    /// When there are no more numbers.
    pub fn seal(&mut self, text: &mut [u8]) -> Result<[u8; TAG]> {
        let nonce = self.nonce()?;
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::empty(), text);
        let tag = tag.ok().context("cannot encrypt")?;
        self.done()?;
        tag.as_ref().try_into().context("a tag of another length")
    }

    /// Decrypts the next message where it stands.
    ///
    /// # Errors
    /// When it is not the one that the other end sealed with this number; what stands there is worth nothing then.
    pub fn open(&mut self, text: &mut [u8], tag: [u8; TAG]) -> Result<()> {
        let nonce = self.nonce()?;
        let opened =
            self.key
                .open_in_place_separate_tag(nonce, Aad::empty(), Tag::from(tag), text, 0..);
        opened.ok().context("not sealed with the key")?;
        self.done()
    }

    fn nonce(&self) -> Result<Nonce> {
        match self.next {
            NO_MESSAGE => bail!("a stream of too many messages"),
            next => Ok(nonce_of(next)),
        }
    }

    fn done(&mut self) -> Result<()> {
        self.next += 1;
        if self.next.is_multiple_of(REKEY) {
            let mut key = [0; KEY];
            let sealed =
                self.key
                    .seal_in_place_separate_tag(nonce_of(NO_MESSAGE), Aad::empty(), &mut key);
            // Nobody asks whether it is the right one.
            let _tag = sealed.ok().context("cannot encrypt")?;
            self.key = key_of(&key)?;
        }
        Ok(())
    }
}

fn key_of(key: &[u8; KEY]) -> Result<LessSafeKey> {
    let key = UnboundKey::new(&AES_256_GCM, key).ok();
    Ok(LessSafeKey::new(key.context("a key of another length")?))
}

fn nonce_of(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    for (byte, from) in bytes.iter_mut().skip(4).zip(number.to_be_bytes()) {
        *byte = from;
    }
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::frames::PATTERN;
    use super::*;
    use snow::TransportState;

    /// Both ends of a handshake that has come to its end.
    fn shaken() -> (HandshakeState, HandshakeState) {
        let builder = || {
            let builder = snow::Builder::new(PATTERN.parse().unwrap());
            builder.psk(0, &[7; 32]).unwrap()
        };
        let mut one = builder().build_initiator().unwrap();
        let mut other = builder().build_responder().unwrap();
        let (mut message, mut scratch) = ([0; 256], [0; 256]);
        let len = one.write_message(&[], &mut message).unwrap();
        other.read_message(&message[..len], &mut scratch).unwrap();
        let len = other.write_message(&[], &mut message).unwrap();
        one.read_message(&message[..len], &mut scratch).unwrap();
        (one, other)
    }

    fn sealed(by: &mut Cipher, text: &[u8]) -> Vec<u8> {
        let mut message = text.to_vec();
        let tag = by.seal(&mut message).unwrap();
        message.extend(tag);
        message
    }

    fn opened(by: &mut Cipher, message: &[u8]) -> Result<Vec<u8>> {
        let (text, tag) = message.split_last_chunk::<TAG>().unwrap();
        let mut text = text.to_vec();
        by.open(&mut text, *tag).map(|()| text)
    }

    #[test]
    fn it_is_the_transport_phase_of_noise_in_both_directions_and_over_a_change_of_keys() {
        let (one, other) = shaken();
        let (mut sends, mut receives) = Cipher::pair(one).unwrap();
        let mut noise: TransportState = other.into_transport_mode().unwrap();
        let mut out = [0; 256];
        for number in 0..3u8 {
            if number == 2 {
                // As if so many had been sent since.
                for cipher in [&mut sends, &mut receives] {
                    cipher.next = REKEY - 1;
                }
                noise.set_receiving_nonce(REKEY - 1);
            }
            let message = sealed(&mut sends, &[number; 100]);
            let len = noise.read_message(&message, &mut out).unwrap();
            assert_eq!(out[..len], [number; 100]);
        }
        noise.rekey_incoming();
        let message = sealed(&mut sends, b"behind");
        let len = noise.read_message(&message, &mut out).unwrap();
        assert_eq!(&out[..len], b"behind");
        receives.next = 0;
        let len = noise.write_message(b"back", &mut out).unwrap();
        assert_eq!(opened(&mut receives, &out[..len]).unwrap(), b"back");
    }

    #[test]
    fn what_is_changed_repeated_left_out_or_sent_back_does_not_open() {
        let (one, other) = shaken();
        let (mut sends, mut own) = Cipher::pair(one).unwrap();
        let (_, mut receives) = Cipher::pair(other).unwrap();
        let [first, second, third] = [1u8, 2, 3].map(|text| sealed(&mut sends, &[text; 40]));
        assert!(opened(&mut own, &first).is_err());
        assert_eq!(opened(&mut receives, &first).unwrap(), [1; 40]);
        assert!(opened(&mut receives, &first).is_err());
        assert!(opened(&mut receives, &third).is_err());
        for at in [0, 39, 40, 55] {
            let mut changed = second.clone();
            changed[at] ^= 1;
            assert!(opened(&mut receives, &changed).is_err());
        }
        assert!(opened(&mut receives, &second[..55]).is_err());
        assert_eq!(opened(&mut receives, &second).unwrap(), [2; 40]);
    }

    #[test]
    fn nothing_comes_of_a_handshake_that_has_not_ended() {
        let builder = snow::Builder::new(PATTERN.parse().unwrap())
            .psk(0, &[7; 32])
            .unwrap();
        assert!(Cipher::pair(builder.build_initiator().unwrap()).is_err());
    }
}
