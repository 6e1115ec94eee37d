"""The legend of axes: one lower-case letter each, so that a name's suffix is its own einsum term.

b  batch               l  length (time)          d  width (channels of the model)
n  state               h  heads                  p  channels of a head
g  groups              r  rank (DPLR, MIMO)      c  chunks
q  chunk size          k  taps of a short convolution, tokens of an attention window
s  planes that turn    v  vocabulary

`x_bld` is an array of shape (batch, length, width); `C_dn` holds one row of N coefficients per channel.
A complex state of a real system comes in conjugate pairs: n counts the N / 2 that are kept, and a
`state_size` counts all N.
"""
